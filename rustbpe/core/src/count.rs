//! Counting the distinct pieces of a stream of texts.
//!
//! Every thread counts into a table of its own, so none ever waits for a lock; at the end the
//! tables are added up. Most of a training on an idle machine is spent here, and it is the part
//! that threads make faster.

use crate::hash::{FastMap, MAX_SHORT, hash_short, short_key, short_word};
use crate::parallel::{blocks, for_each_task};
use crate::split::Split;

/// Text that a thread takes at a time: about a millisecond of counting. That is much longer than
/// taking it, and shorter than a scheduler's time slice, so no thread holds up the end of a batch
/// for long.
const BLOCK_BYTES: usize = 1 << 18;

/// A thread is started for each so many blocks. When other programs keep all processors busy, a new
/// thread can wait for a time slice of theirs (some milliseconds) before it runs, and the batch ends
/// only after it has run; with less work than that, one thread is done sooner alone.
const BLOCKS_PER_THREAD: usize = 4;

/// How often each distinct piece occurred. Memory grows with the distinct pieces, not with the text.
pub struct WordCounts {
    per_thread: Vec<WordTable>,
}

impl WordCounts {
    /// Counts with up to `num_threads` threads, at least one.
    pub fn new(num_threads: usize) -> Self {
        assert!(num_threads > 0);
        Self { per_thread: (0..num_threads).map(|_| WordTable::new()).collect() }
    }

    /// Counts the pieces of all texts.
    pub fn add<S: Split>(&mut self, splitter: &S, texts: &[&str]) -> Result<(), S::Error> {
        let blocks = blocks(texts, BLOCK_BYTES);
        let num_threads = blocks.len().div_ceil(BLOCKS_PER_THREAD).clamp(1, self.per_thread.len());
        for_each_task(&mut self.per_thread[..num_threads], blocks.len(), |table, block| {
            for text in &texts[blocks[block].clone()] {
                splitter.split(text, |start, end| {
                    table.add(text.as_bytes(), start, end);
                })?;
            }
            Ok(())
        })
    }

    /// Calls `word(bytes, count)` once for each distinct piece, in no particular order.
    ///
    /// One thread adds up the tables: they hold distinct pieces only, and most of the time goes into
    /// memory touched for the first time, which threads do not make faster.
    pub fn into_words(self, mut word: impl FnMut(&[u8], u64)) {
        let mut tables = self.per_thread.into_iter();
        let mut all = tables.next().expect("at least one thread");
        for table in tables {
            for slot in table.short_words() {
                all.add_short(slot.key, slot.count);
            }
            for (bytes, count) in table.long {
                all.add_long(&bytes, count);
            }
        }
        for slot in all.short_words() {
            let (bytes, len) = short_word(slot.key);
            word(&bytes[..len], slot.count);
        }
        for (bytes, count) in all.long {
            word(&bytes, count);
        }
    }
}

/// One cache line holds two.
#[derive(Clone, Copy)]
struct Slot {
    key: u128,
    count: u64, // 0 in an empty slot
}

/// Short words in open addressing with linear probing, the few long ones in a map of their own.
///
/// The alignment keeps the fields of two threads' tables out of one cache line, and out of two that
/// the processor fetches together; otherwise each count would invalidate the other thread's cache.
#[repr(align(128))]
struct WordTable {
    short: Vec<Slot>,
    num_short: usize,
    long: FastMap<Box<[u8]>, u64>,
}

const EMPTY: Slot = Slot { key: 0, count: 0 };

impl WordTable {
    fn new() -> Self {
        Self { short: vec![EMPTY; 1 << 12], num_short: 0, long: FastMap::default() }
    }

    #[inline(always)]
    fn add(&mut self, text: &[u8], start: usize, end: usize) {
        match short_key(text, start, end) {
            Some(key) => self.add_short(key, 1),
            None => self.add_long(&text[start..end], 1),
        }
    }

    #[inline(always)]
    fn add_short(&mut self, key: u128, count: u64) {
        let mask = self.short.len() - 1;
        let mut at = hash_short(key) as usize & mask;
        loop {
            let slot = &mut self.short[at];
            if slot.key == key {
                slot.count += count;
                return;
            }
            if slot.count == 0 {
                *slot = Slot { key, count };
                self.num_short += 1;
                break;
            }
            at = (at + 1) & mask;
        }
        if 2 * self.num_short > self.short.len() {
            self.grow();
        }
    }

    #[cold]
    fn grow(&mut self) {
        let larger = vec![EMPTY; 2 * self.short.len()];
        let old = std::mem::replace(&mut self.short, larger);
        self.num_short = 0;
        for slot in old.iter().filter(|slot| slot.count > 0) {
            self.add_short(slot.key, slot.count);
        }
    }

    #[inline(never)]
    fn add_long(&mut self, word: &[u8], count: u64) {
        debug_assert!(word.len() > MAX_SHORT);
        match self.long.get_mut(word) {
            Some(total) => *total += count,
            None => {
                self.long.insert(word.into(), count);
            }
        }
    }

    fn short_words(&self) -> impl Iterator<Item = &Slot> {
        self.short.iter().filter(|slot| slot.count > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};
    use std::convert::Infallible;
    use std::sync::Mutex;
    use std::thread::{self, ThreadId};
    use std::time::Duration;

    use super::*;
    use crate::split::Gpt4Split;

    /// Splits, notes which threads do, and makes some of them slow.
    struct SlowSplit {
        threads: Mutex<HashSet<ThreadId>>,
        is_slow: fn(bool) -> bool,
        caller: ThreadId,
    }

    impl SlowSplit {
        /// `is_slow` gets whether the thread is the calling one.
        fn new(is_slow: fn(bool) -> bool) -> Self {
            Self { threads: Mutex::default(), is_slow, caller: thread::current().id() }
        }
    }

    impl Split for SlowSplit {
        type Error = Infallible;

        fn split(&self, text: &str, piece: impl FnMut(usize, usize)) -> Result<(), Infallible> {
            let thread = thread::current().id();
            self.threads.lock().unwrap().insert(thread);
            if (self.is_slow)(thread == self.caller) {
                thread::sleep(Duration::from_millis(20));
            }
            Gpt4Split::new(2).split(text, piece)
        }
    }

    fn counts(texts: &[&str], num_threads: usize, batch: usize) -> BTreeMap<Vec<u8>, u64> {
        let mut words = WordCounts::new(num_threads);
        for batch in texts.chunks(batch) {
            let Ok(()) = words.add(&Gpt4Split::new(2), batch);
        }
        let mut all = BTreeMap::new();
        words.into_words(|word, count| assert!(all.insert(word.to_vec(), count).is_none()));
        all
    }

    #[test]
    fn counts_do_not_depend_on_threads_or_batches() {
        let long = "incomprehensibilities ".repeat(40_000);
        let many: Vec<String> = (0..9000).map(|i| format!("w{i}x{i} the\u{e9} the")).collect();
        let mut texts: Vec<&str> = many.iter().map(String::as_str).collect();
        texts.extend([&long[..]; 8]);
        let one = counts(&texts, 1, texts.len());
        assert_eq!(one[&b" the"[..]], 9000);
        assert_eq!(one[&b" incomprehensibilities"[..]], 8 * 39_999);
        for num_threads in [2, 3, 9] {
            assert_eq!(counts(&texts, num_threads, texts.len()), one);
            assert_eq!(counts(&texts, num_threads, 17), one);
        }
    }
    #[test]
    fn slow_threads_change_nothing() {
        let words: Vec<String> = (0..20_000).map(|i| format!(" word{}", i % 700)).collect();
        let texts = vec![words.concat(); 24];
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let one = counts(&texts, 1, texts.len());
        for is_slow in [|is_caller: bool| is_caller, |is_caller: bool| !is_caller] {
            let splitter = SlowSplit::new(is_slow);
            let mut words = WordCounts::new(3);
            let Ok(()) = words.add(&splitter, &texts);
            let mut all = BTreeMap::new();
            words.into_words(|word, count| assert!(all.insert(word.to_vec(), count).is_none()));
            assert_eq!(all, one);
        }
    }

    #[test]
    fn little_text_is_counted_by_the_calling_thread() {
        let text = "a few words ".repeat(BLOCK_BYTES / 12 + 1);
        let splitter = SlowSplit::new(|is_caller| is_caller);
        let Ok(()) = WordCounts::new(9).add(&splitter, &[&text[..]; BLOCKS_PER_THREAD]);
        assert_eq!(splitter.threads.into_inner().unwrap(), HashSet::from([splitter.caller]));
    }
}
