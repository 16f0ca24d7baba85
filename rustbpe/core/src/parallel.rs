//! Sharing work between threads.
//!
//! Nothing here spins or waits for a particular thread: whoever runs takes the next task. A thread
//! that gets no processor, because other programs are busy, there are more threads than processors
//! or a container has used up its quota, takes no task and is missed by no one. A thread that loses
//! its processor within a task delays the end by that task alone, so tasks should be short.

use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Calls `work(state, task)` once for each task below `num_tasks`, with as many threads as there
/// are states; the calling thread is the first one. After an error no further task begins, and the
/// error of the first state that has one is returned.
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
    // More threads than tasks would only be started and joined.
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
    use std::sync::Mutex;
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Duration;

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
    fn a_slow_thread_holds_up_only_its_own_task() {
        // A helper that lost its processor within its first task: it gets it back when the calling
        // thread has done all others. If that one waited instead, or left a share to the helper,
        // neither would ever end.
        const NUM_TASKS: usize = 100;
        let caller = thread::current().id();
        let (has_begun, begun) = channel();
        let (is_done, done) = channel();
        let (begun, done) = (Mutex::new(begun), Mutex::new(done));
        let num_done = AtomicUsize::new(0);
        let wait = |receiver: &Mutex<Receiver<()>>| {
            let minute = Duration::from_secs(60);
            receiver.lock().unwrap().recv_timeout(minute).expect("the other thread gets there");
        };
        let mut states = [Vec::new(), Vec::new()];
        let result: Result<(), ()> = for_each_task(&mut states, NUM_TASKS, |seen, task| {
            if thread::current().id() != caller {
                has_begun.send(()).unwrap();
                wait(&done);
            } else if seen.is_empty() {
                wait(&begun);
            }
            seen.push(task);
            if num_done.fetch_add(1, Ordering::Relaxed) + 2 == NUM_TASKS {
                is_done.send(()).unwrap();
            }
            Ok(())
        });
        assert_eq!(result, Ok(()));
        assert_eq!(states.map(|seen| seen.len()), [NUM_TASKS - 1, 1]);
    }

    #[test]
    fn blocks_cover_all() {
        let texts = ["aaaa", "", "b", "cccccccc", "", ""];
        assert_eq!(blocks(&texts, 5), [0..3, 3..4, 4..6]);
        assert_eq!(blocks::<&str>(&[], 5), []);
    }
}
