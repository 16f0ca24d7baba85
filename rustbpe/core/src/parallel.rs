//! Sharing work between threads.

use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::{hint, thread};

/// Calls `work(state, task)` once for each task below `num_tasks`, with as many threads as there
/// are states, the calling thread with the first one. The first error stops all.
pub fn for_each_task<S: Send, E: Send>(
    states: &mut [S],
    num_tasks: usize,
    work: impl Fn(&mut S, usize) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let next = AtomicUsize::new(0);
    let worker = |state: &mut S| {
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= num_tasks {
                return Ok(());
            }
            if let Err(error) = work(state, task) {
                next.store(num_tasks, Ordering::Relaxed);
                return Err(error);
            }
        }
    };
    let (first, others) = states.split_first_mut().expect("at least one thread");
    thread::scope(|scope| {
        let others = others.iter_mut().take(num_tasks.saturating_sub(1));
        let handles: Vec<_> = others.map(|state| scope.spawn(|| worker(state))).collect();
        let first = worker(first);
        handles.into_iter().fold(first, |result, handle| {
            result.and(handle.join().unwrap_or_else(|panic| resume_unwind(panic)))
        })
    })
}

/// Calls `work` with each item, all at once: in threads, the first in the calling one.
pub fn map_in_threads<T: Send, R: Send>(items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let work = &work;
    let mut items = items.into_iter();
    let Some(first) = items.next() else { return Vec::new() };
    thread::scope(|scope| {
        let others: Vec<_> = items.map(|item| scope.spawn(move || work(item))).collect();
        let mut results = vec![work(first)];
        let join = |thread: thread::ScopedJoinHandle<_>| thread.join();
        results
            .extend(others.into_iter().map(join).map(|r| r.unwrap_or_else(|p| resume_unwind(p))));
        results
    })
}

/// Threads that wait for work so short that waking a thread would take longer.
pub struct Helpers<T>(Vec<(Sender<T>, Receiver<T>)>);

impl<T> Helpers<T> {
    /// Gives a helper an item.
    pub fn start(&self, number: usize, item: T) {
        self.0[number].0.send(item).expect("a helper has ended");
    }

    /// The item that was given to a helper, worked on.
    pub fn finish(&self, number: usize) -> T {
        receive(&self.0[number].1).expect("a helper has ended")
    }
}

/// Calls `body` with `num` helpers that call `work`.
pub fn with_helpers<T: Send, R>(
    num: usize,
    work: impl Fn(&mut T) + Sync,
    body: impl FnOnce(&Helpers<T>) -> R,
) -> R {
    let work = &work;
    thread::scope(|scope| {
        let helper = |_| {
            let (sender, items) = channel();
            let (results, receiver) = channel();
            scope.spawn(move || {
                while let Some(mut item) = receive(&items) {
                    work(&mut item);
                    if results.send(item).is_err() {
                        return;
                    }
                }
            });
            (sender, receiver)
        };
        let helpers = Helpers((0..num).map(helper).collect());
        let result = body(&helpers);
        drop(helpers);
        result
    })
}

/// The next item, looked for awhile before the thread sleeps. None if there will be none.
fn receive<T>(receiver: &Receiver<T>) -> Option<T> {
    for _ in 0..SPINS {
        if let Ok(item) = receiver.try_recv() {
            return Some(item);
        }
        hint::spin_loop();
    }
    receiver.recv().ok()
}

/// About a millisecond: more than the time between two shared merges, as long as there are many.
const SPINS: usize = 20_000;

/// Consecutive ranges of `texts` of about `block_bytes` each: the tasks of [`for_each_task`].
pub fn blocks<T: AsRef<str>>(texts: &[T], block_bytes: usize) -> Vec<Range<usize>> {
    let mut blocks = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, text) in texts.iter().enumerate() {
        bytes += text.as_ref().len();
        if bytes >= block_bytes || i + 1 == texts.len() {
            blocks.push(start..i + 1);
            (start, bytes) = (i + 1, 0);
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_once_and_errors_stop() {
        let mut states = vec![Vec::new(); 3];
        let all: Result<(), ()> = for_each_task(&mut states, 100, |seen, task| {
            seen.push(task);
            Ok(())
        });
        assert_eq!(all, Ok(()));
        let mut tasks = states.concat();
        tasks.sort_unstable();
        assert_eq!(tasks, (0..100).collect::<Vec<_>>());
        let failed = for_each_task(&mut states, 100, |_, task| match task {
            7 => Err("seven"),
            _ => Ok(()),
        });
        assert_eq!(failed, Err("seven"));
    }

    #[test]
    fn helpers_work_on_what_they_are_given() {
        assert_eq!(map_in_threads(vec![2, 3, 4], |i| i * i), [4, 9, 16]);
        let sums: Vec<Vec<usize>> = with_helpers(
            2,
            |item| *item *= 10,
            |helpers| {
                let rounds = (0..1000).map(|i| {
                    helpers.start(0, i);
                    helpers.start(1, i + 1);
                    vec![helpers.finish(0), helpers.finish(1)]
                });
                rounds.collect()
            },
        );
        assert!((0..1000).all(|i| sums[i] == [10 * i, 10 * i + 10]));
    }

    #[test]
    fn blocks_cover_all() {
        let texts = ["aaaa", "", "b", "cccccccc", "", ""];
        assert_eq!(blocks(&texts, 5), [0..3, 3..4, 4..6]);
        assert_eq!(blocks::<&str>(&[], 5), []);
    }
}
