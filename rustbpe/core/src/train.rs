//! Learning merges from counted words.
//!
//! All distinct words lie in one arena, a cell per byte. A token covers as many cells as it has
//! bytes; its first and its last cell carry its id, those between carry none. So the neighbours of
//! a token are found by its length alone, and a merge writes at most four cells.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use crate::count::WordCounts;
use crate::hash::PairMap;

/// Ids of the two tokens that form a new one; bytes are their own ids, merges count from 256.
pub type Merge = (u32, u32);

/// Which of the pairs of one count is merged first: the one of the smaller ids, left id first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TieBreak {
    /// Ids of bytes are the bytes.
    RustBpe,
    /// Ids of bytes follow the printable characters that stand for them in a byte-level vocabulary.
    HuggingFace,
}

impl TieBreak {
    /// The bytes in the order of their ids.
    fn bytes(self) -> [u8; 256] {
        let mut bytes: [u8; 256] = std::array::from_fn(|byte| byte as u8);
        if self == Self::HuggingFace {
            // The others stand behind U+00FF, in ascending order.
            let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            bytes.sort_by_key(|&byte| !printable(byte));
        }
        bytes
    }
}

/// Why training ended early.
#[derive(Debug, PartialEq, Eq)]
pub enum TrainError<E> {
    /// The distinct words together have more bytes than cells can be numbered: 4 GiB.
    TooManyWords,
    /// What `observe` returned.
    Stopped(E),
}

/// Learns up to `num_merges` merges, fewer if no pair is left.
///
/// The pair of the highest count is merged, `tie_break` deciding between equals. `observe(done)` is
/// called before every merge; an error from it ends the training.
pub fn train<E>(
    words: WordCounts,
    num_merges: usize,
    tie_break: TieBreak,
    mut observe: impl FnMut(usize) -> Result<(), E>,
) -> Result<Vec<Merge>, TrainError<E>> {
    let bytes = tie_break.bytes();
    let mut trainer = Trainer::new(words, &bytes).ok_or(TrainError::TooManyWords)?;
    let mut merges = Vec::new();
    let byte_or_merge = |id: u32| bytes.get(id as usize).map_or(id, |&byte| byte as u32);
    while merges.len() < num_merges {
        observe(merges.len()).map_err(TrainError::Stopped)?;
        let Some((left, right)) = trainer.merge_most_frequent() else {
            break;
        };
        merges.push((byte_or_merge(left), byte_or_merge(right)));
    }
    Ok(merges)
}

/// One byte of a word, or the end of one.
#[derive(Clone, Copy)]
struct Cell {
    token: u32,
    word: u32,
}

const WORD_END: u32 = u32::MAX;
const INSIDE: u32 = u32::MAX - 1;

/// What is known of a pair: how often it occurs, and where it began once. A position stays when
/// the pair there is gone, so each is checked before use.
struct Pair {
    ids: (u32, u32),
    count: u64,
    positions: Range<usize>,
}

/// A pair's count, ids and index, the next to merge greatest. The count may be too high, never too
/// low, as a pair's count only falls once it is made.
type Candidate = (u64, Reverse<(u32, u32)>, u32);

struct Trainer {
    cells: Vec<Cell>,
    word_counts: Vec<u64>,
    token_lens: Vec<u32>,
    pairs: Vec<Pair>,
    index_of_pair: PairMap,
    /// All positions of all pairs, of each pair ascending.
    positions: Vec<u32>,
    queue: BinaryHeap<Candidate>,
    left: Neighbours,
    right: Neighbours,
}

impl Trainer {
    /// None if the words are too many.
    fn new(words: WordCounts, bytes: &[u8; 256]) -> Option<Self> {
        let mut id_of_byte = [0; 256];
        for (id, &byte) in bytes.iter().enumerate() {
            id_of_byte[byte as usize] = id as u32;
        }
        let mut word_counts = Vec::new();
        let mut cells = vec![Cell { token: WORD_END, word: 0 }];
        words.into_words(|bytes, count| {
            if bytes.len() < 2 {
                return;
            }
            let word = word_counts.len() as u32;
            word_counts.push(count);
            let tokens = bytes.iter().map(|&byte| id_of_byte[byte as usize]);
            cells.extend(tokens.chain([WORD_END]).map(|token| Cell { token, word }));
        });
        if cells.len() > u32::MAX as usize {
            return None;
        }
        let mut trainer = Self {
            cells,
            word_counts,
            token_lens: vec![1; 256],
            pairs: Vec::new(),
            index_of_pair: PairMap::new(),
            positions: Vec::new(),
            queue: BinaryHeap::new(),
            left: Neighbours::default(),
            right: Neighbours::default(),
        };
        trainer.count_byte_pairs();
        Some(trainer)
    }

    fn count_byte_pairs(&mut self) {
        let at = |pair: &[Cell]| (pair[0].token as usize) << 8 | pair[1].token as usize;
        let is_pair = |pair: &[Cell]| pair[0].token != WORD_END && pair[1].token != WORD_END;
        let mut counts = vec![0; 1 << 16];
        let mut ends = vec![0; 1 << 16];
        for pair in self.cells.windows(2).filter(|pair| is_pair(pair)) {
            counts[at(pair)] += self.word_counts[pair[0].word as usize];
            ends[at(pair)] += 1;
        }
        let mut start = 0;
        for end in &mut ends {
            (start, *end) = (start + *end, start);
        }
        self.positions = vec![0; start];
        for (i, pair) in self.cells.windows(2).enumerate() {
            if is_pair(pair) {
                let end = &mut ends[at(pair)];
                self.positions[*end] = i as u32;
                *end += 1;
            }
        }
        let mut start = 0;
        for (i, &end) in ends.iter().enumerate() {
            if end > start {
                self.add_pair(((i >> 8) as u32, (i & 0xFF) as u32), counts[i], start..end);
            }
            start = end;
        }
    }

    fn add_pair(&mut self, ids: (u32, u32), count: u64, positions: Range<usize>) {
        let index = self.pairs.len() as u32;
        self.index_of_pair.insert(ids.0, ids.1, index);
        self.queue.push((count, Reverse(ids), index));
        self.pairs.push(Pair { ids, count, positions });
    }

    /// Merges the most frequent pair everywhere. None if no pair is left.
    fn merge_most_frequent(&mut self) -> Option<(u32, u32)> {
        loop {
            let (count, ids, index) = self.queue.pop()?;
            let now = self.pairs[index as usize].count;
            if now == count {
                self.merge(index as usize);
                return Some(ids.0);
            }
            if now > 0 {
                self.queue.push((now, ids, index));
            }
        }
    }

    fn merge(&mut self, index: usize) {
        let (a, b) = self.pairs[index].ids;
        let merged = self.token_lens.len() as u32;
        let (a_len, b_len) = (self.token_lens[a as usize], self.token_lens[b as usize]);
        self.token_lens.push(a_len + b_len);
        self.left.clear(merged);
        self.right.clear(merged);
        for i in self.pairs[index].positions.clone() {
            let start = self.positions[i] as usize;
            let middle = start + a_len as usize;
            if self.cells[start].token != a || self.cells[middle].token != b {
                continue;
            }
            let end = middle + b_len as usize;
            let count = self.word_counts[self.cells[start].word as usize];
            for inside in [start, middle - 1, middle, end - 1] {
                self.cells[inside].token = INSIDE;
            }
            self.cells[start].token = merged;
            self.cells[end - 1].token = merged;
            let left = self.cells[start - 1].token;
            if left != WORD_END {
                let left_start = start - self.token_lens[left as usize] as usize;
                self.left.add(left, left_start, count);
            }
            let right = self.cells[end].token;
            if right != WORD_END {
                self.right.add(right, start, count);
            }
        }
        self.pairs[index].count = 0;
        self.update_counts((a, b), merged);
    }

    /// Around each merged pair (l a b r), pairs (l a) and (b r) became (l m) and (m r).
    fn update_counts(&mut self, (a, b): (u32, u32), merged: u32) {
        let (mut left, mut right) =
            (std::mem::take(&mut self.left), std::mem::take(&mut self.right));
        for group in &left.groups {
            // A pair (m a), seen as the merge to its left was made, is gone with this one.
            if group.token == merged {
                right.subtract(a, group.count);
            } else if (group.token, a) != (a, b) {
                self.subtract((group.token, a), group.count);
            }
        }
        for group in &right.groups {
            if (b, group.token) != (a, b) {
                self.subtract((b, group.token), group.total);
            }
        }
        left.place(&mut self.positions);
        right.place(&mut self.positions);
        for group in &left.groups {
            self.add_pair((group.token, merged), group.count, group.positions.clone());
        }
        for group in right.groups.iter().filter(|group| group.count > 0) {
            self.add_pair((merged, group.token), group.count, group.positions.clone());
        }
        (self.left, self.right) = (left, right);
    }

    fn subtract(&mut self, pair: (u32, u32), count: u64) {
        let index = self.index_of_pair.get(pair.0, pair.1);
        let index = index.expect("a pair that is gone was counted");
        self.pairs[index as usize].count -= count;
    }
}

/// The tokens on one side of the occurrences of a merged pair.
#[derive(Default)]
struct Neighbours {
    /// Number of a token's group, or NO_GROUP.
    group_of_token: Vec<u32>,
    groups: Vec<Group>,
    /// Group and position of the new pair, in the order of the text.
    occurrences: Vec<(u32, u32)>,
}

struct Group {
    token: u32,
    /// Sum over the words in which it was seen.
    total: u64,
    /// The same, without what has been taken off since.
    count: u64,
    positions: Range<usize>,
}

const NO_GROUP: u32 = u32::MAX;

impl Neighbours {
    /// Forgets all, and makes room for tokens up to `last`.
    fn clear(&mut self, last: u32) {
        for group in self.groups.drain(..) {
            self.group_of_token[group.token as usize] = NO_GROUP;
        }
        self.group_of_token.resize(last as usize + 1, NO_GROUP);
        self.occurrences.clear();
    }

    #[inline(always)]
    fn add(&mut self, token: u32, position: usize, count: u64) {
        let mut number = self.group_of_token[token as usize];
        if number == NO_GROUP {
            number = self.groups.len() as u32;
            self.group_of_token[token as usize] = number;
            self.groups.push(Group { token, total: 0, count: 0, positions: 0..0 });
        }
        let group = &mut self.groups[number as usize];
        group.total += count;
        group.count += count;
        group.positions.end += 1;
        self.occurrences.push((number, position as u32));
    }

    fn subtract(&mut self, token: u32, count: u64) {
        let number = self.group_of_token[token as usize];
        self.groups[number as usize].count -= count;
    }

    /// Appends the positions of all groups to `positions` and sets the ranges.
    fn place(&mut self, positions: &mut Vec<u32>) {
        let mut start = positions.len();
        for group in &mut self.groups {
            let len = group.positions.len();
            group.positions = start..start;
            start += len;
        }
        positions.resize(start, 0);
        for &(number, position) in &self.occurrences {
            let end = &mut self.groups[number as usize].positions.end;
            positions[*end] = position;
            *end += 1;
        }
    }
}
