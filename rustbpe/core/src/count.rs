//! Counting the distinct pieces of a stream of texts.

use std::hash::BuildHasher;

use crate::hash::{FastMap, MAX_SHORT, hash_short, short_key, short_word};
use crate::parallel::{blocks, for_each_task, map_in_threads};
use crate::split::Split;

/// Work unit of a thread: large against a task's overhead, small against a batch.
const BLOCK_BYTES: usize = 1 << 18;

/// How often each distinct piece occurred. Memory grows with the distinct pieces, not with the text.
pub struct WordCounts {
    per_thread: Vec<WordTable>,
}

impl WordCounts {
    /// Counts with `num_threads` threads, at least one.
    pub fn new(num_threads: usize) -> Self {
        assert!(num_threads > 0);
        Self { per_thread: (0..num_threads).map(|_| WordTable::new()).collect() }
    }

    /// Counts the pieces of all texts.
    pub fn add<S: Split>(&mut self, splitter: &S, texts: &[&str]) -> Result<(), S::Error> {
        let blocks = blocks(texts, BLOCK_BYTES);
        for_each_task(&mut self.per_thread, blocks.len(), |table, block| {
            for text in &texts[blocks[block].clone()] {
                splitter.split(text, |start, end| {
                    table.add(text.as_bytes(), start, end);
                })?;
            }
            Ok(())
        })
    }

    /// The pieces in parts of about the same size, one for each thread but at most `max_parts`.
    pub fn into_parts(self, max_parts: usize) -> Vec<WordPart> {
        let tables = self.per_thread;
        let num_parts = tables.len().min(max_parts);
        let found = map_in_threads(tables.iter().enumerate().collect(), |(thread, table)| {
            let mut parts: Vec<_> = (0..num_parts).map(|_| Words::default()).collect();
            let elsewhere = |hash| part_of(hash, num_parts) != thread;
            for (hash, slot) in table.short_words(elsewhere) {
                parts[part_of(hash, num_parts)].short.push(*slot);
            }
            for (hash, word, count) in table.long_words(elsewhere) {
                parts[part_of(hash, num_parts)].long.push((word.into(), count));
            }
            parts
        });
        let mut parts: Vec<_> = tables
            .into_iter()
            .take(num_parts)
            .enumerate()
            .map(|(number, table)| WordPart { table, number, num_parts, incoming: Vec::new() })
            .collect();
        for found in found {
            parts.iter_mut().zip(found).for_each(|(part, words)| part.incoming.push(words));
        }
        parts
    }
}

/// Which part has the words of a hash. The low bits, which choose a slot, are left alone.
fn part_of(hash: u64, num_parts: usize) -> usize {
    (hash >> 32) as usize % num_parts
}

/// Words and how often they occurred.
#[derive(Default)]
struct Words {
    short: Vec<Slot>,
    long: Vec<(Box<[u8]>, u64)>,
}

/// Some of the distinct pieces.
pub struct WordPart {
    /// What one thread counted, also of other parts.
    table: WordTable,
    /// What the other threads counted of this part.
    incoming: Vec<Words>,
    number: usize,
    num_parts: usize,
}

impl WordPart {
    /// Calls `word(bytes, count)` once for each piece, in no certain order.
    pub fn into_words(self, mut word: impl FnMut(&[u8], u64)) {
        let mut table = self.table;
        for words in self.incoming {
            words.short.iter().for_each(|slot| table.add_short(slot.key, slot.count));
            words.long.iter().for_each(|(word, count)| table.add_long(word, *count));
        }
        let is_here = |hash| part_of(hash, self.num_parts) == self.number;
        for (_, slot) in table.short_words(is_here) {
            let (bytes, len) = short_word(slot.key);
            word(&bytes[..len], slot.count);
        }
        for (_, bytes, count) in table.long_words(is_here) {
            word(bytes, count);
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
/// Tables of two threads are never in one cache line, nor in two that are fetched together.
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

    /// Those of the short words whose hash is wanted, with it.
    fn short_words(&self, wanted: impl Fn(u64) -> bool) -> impl Iterator<Item = (u64, &Slot)> {
        let words = self.short.iter().filter(|slot| slot.count > 0);
        words.map(|slot| (hash_short(slot.key), slot)).filter(move |word| wanted(word.0))
    }

    /// Those of the long words whose hash is wanted, with it.
    fn long_words(&self, wanted: impl Fn(u64) -> bool) -> impl Iterator<Item = (u64, &[u8], u64)> {
        let hash = |word: &[u8]| self.long.hasher().hash_one(word);
        let words = self.long.iter().map(move |(word, &count)| (hash(word), &word[..], count));
        words.filter(move |word| wanted(word.0))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::split::Gpt4Split;

    fn counts(
        texts: &[&str],
        num_threads: usize,
        batch: usize,
        max_parts: usize,
    ) -> BTreeMap<Vec<u8>, u64> {
        let mut words = WordCounts::new(num_threads);
        for batch in texts.chunks(batch) {
            let Ok(()) = words.add(&Gpt4Split::new(2), batch);
        }
        let mut all = BTreeMap::new();
        for part in words.into_parts(max_parts) {
            part.into_words(|word, count| assert!(all.insert(word.to_vec(), count).is_none()));
        }
        all
    }

    #[test]
    fn counts_do_not_depend_on_threads_batches_or_parts() {
        let long = "incomprehensibilities ".repeat(40_000);
        let many: Vec<String> = (0..9000).map(|i| format!("w{i}x{i} the\u{e9} the")).collect();
        let mut texts: Vec<&str> = many.iter().map(String::as_str).collect();
        texts.push(&long);
        let one = counts(&texts, 1, texts.len(), 9);
        assert_eq!(one[&b" the"[..]], 9000);
        assert_eq!(one[&b" incomprehensibilities"[..]], 39_999);
        assert_eq!(counts(&texts, 3, 17, 1), one);
        assert_eq!(counts(&texts, 3, 17, 9), one);
        assert_eq!(counts(&texts, 3, 17, 2), one);
    }
}
