//! Learning merges from counted words.
//!
//! # The arena
//!
//! All distinct words lie one after another in one vector of cells, a cell per byte, with an end
//! mark before the first word and after each one. A token covers as many cells as it has bytes; its
//! first and its last cell carry its id, those between are marked `INSIDE`. After the merges
//! `t h -> 256` and `256 e -> 257`, the words "then" and "the" are
//!
//! ```text
//! position   0    1     2      3    4    5    6     7      8    9
//! cell      END  257  INSIDE  257   n   END  257  INSIDE  257  END
//! ```
//!
//! So both neighbours of a token are found from its position and length alone: the left one ends in
//! the cell before it, the right one begins in the cell after it. There are no links to follow or
//! update, and a merge writes at most four cells.
//!
//! # One merge
//!
//! 1. The queue yields the pair with the highest count.
//! 2. [`Arena::merge`] visits the positions where the pair was ever seen, writes the new token where
//!    it still is, and collects the tokens to the left and to the right.
//! 3. [`Trainer::update_counts`] lowers the counts of the pairs that disappeared and adds those that
//!    the new token forms with its neighbours, with their positions.
//!
//! # Why one thread merges
//!
//! There are tens of thousands of merges, nearly all of them at a few positions only: they take
//! about a microsecond, less than it takes to wake another thread. Helpers would have to spin
//! between merges to be there in time, and then take the processor from whoever else needs it, the
//! merging thread included. Long merges could be shared without spinning, but there are few, and
//! most of the time goes into the tables of step 3. Counting, in contrast, shares well.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use crate::count::WordCounts;
use crate::hash::PairMap;

/// Ids of the two tokens that form a new one. Bytes are their own ids, merges count from 256.
pub type Merge = (u32, u32);

/// Which of several pairs with the same count is merged first: the one with the smaller left id, or
/// with the smaller right id if the left ones are equal. The order of the ids of bytes differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TieBreak {
    /// The id of a byte is its value.
    RustBpe,
    /// Bytes are ordered as the printable characters that represent them in a byte-level vocabulary.
    HuggingFace,
}

impl TieBreak {
    /// The bytes in the order of their ids.
    fn bytes(self) -> [u8; 256] {
        let mut bytes: [u8; 256] = std::array::from_fn(|byte| byte as u8);
        if self == Self::HuggingFace {
            // A printable byte is represented by itself, the others by characters above U+00FF, in
            // ascending order. The sort is stable.
            let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            bytes.sort_by_key(|&byte| !printable(byte));
        }
        bytes
    }
}

/// Why training ended early.
#[derive(Debug, PartialEq, Eq)]
pub enum TrainError<E> {
    /// The distinct words together have more than 2^32 bytes, so cells cannot be numbered with 32
    /// bits.
    TooManyWords,
    /// What `observe` returned.
    Stopped(E),
}

/// Learns up to `num_merges` merges, fewer if no pair is left.
///
/// Each time the pair with the highest count is merged; `tie_break` decides between equal counts.
/// `observe(done)` is called before every merge, and an error from it ends the training. The merges
/// do not depend on how many threads counted the words.
pub fn train<E>(
    words: WordCounts,
    num_merges: usize,
    tie_break: TieBreak,
    mut observe: impl FnMut(usize) -> Result<(), E>,
) -> Result<Vec<Merge>, TrainError<E>> {
    let bytes = tie_break.bytes();
    let mut id_of_byte = [0; 256];
    for (id, &byte) in bytes.iter().enumerate() {
        id_of_byte[byte as usize] = id as u32;
    }
    let arena = Arena::new(words, &id_of_byte);
    if arena.cells.len() > u32::MAX as usize {
        return Err(TrainError::TooManyWords);
    }
    // Inside, ids of bytes are in the order of the tie break; merges name bytes by their values.
    let byte_or_merge = |id: u32| bytes.get(id as usize).map_or(id, |&byte| byte as u32);
    let mut trainer = Trainer::new(arena);
    let mut merges = Vec::new();
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
/// Positions that are read before the first of them is written.
const BATCH: usize = 32;

/// A merge: the two tokens, their lengths in bytes, and the token that they become.
#[derive(Clone, Copy)]
struct Job {
    ids: (u32, u32),
    lens: (u32, u32),
    merged: u32,
}

/// All distinct words and how often each occurred.
struct Arena {
    cells: Vec<Cell>,
    word_counts: Vec<u64>,
}

impl Arena {
    fn new(words: WordCounts, id_of_byte: &[u32; 256]) -> Self {
        let mut word_counts = Vec::new();
        let mut cells = vec![Cell { token: WORD_END, word: 0 }];
        words.into_words(|bytes, count| {
            if bytes.len() < 2 {
                return; // it has no pair
            }
            let word = word_counts.len() as u32;
            word_counts.push(count);
            let tokens = bytes.iter().map(|&byte| id_of_byte[byte as usize]);
            cells.extend(tokens.chain([WORD_END]).map(|token| Cell { token, word }));
        });
        Self { cells, word_counts }
    }

    /// Calls `pair(position, index, count)` for each pair of neighbouring bytes, in the order of the
    /// words; `index` is left id << 8 | right id, `count` how often the word occurred.
    fn byte_pairs(&self, mut pair: impl FnMut(u32, usize, u64)) {
        for (position, cells) in (0..).zip(self.cells.windows(2)) {
            let (left, right) = (cells[0].token, cells[1].token);
            if left != WORD_END && right != WORD_END {
                let count = self.word_counts[cells[0].word as usize];
                pair(position, (left << 8 | right) as usize, count);
            }
        }
    }

    /// Merges the pair at those of `positions`, ascending, where it still is, and adds the tokens
    /// around it to `left` and `right`.
    fn merge(
        &mut self,
        job: Job,
        positions: &[u32],
        left: &mut Neighbours,
        right: &mut Neighbours,
    ) {
        let (Job { ids: (a, b), lens, merged }, cells) = (job, &mut self.cells);
        let (a_len, b_len) = (lens.0 as usize, lens.1 as usize);
        for batch in positions.chunks(BATCH) {
            // Nearly every read misses the caches. Reads that do not depend on one another overlap,
            // so all of a batch are made first, without a branch on what they find.
            let mut found = [(0, 0); BATCH];
            let mut num_found = 0;
            for &position in batch {
                let start = position as usize;
                let cell = cells[start];
                found[num_found] = (start, self.word_counts[cell.word as usize]);
                num_found += usize::from((cell.token == a) & (cells[start + a_len].token == b));
            }
            for &(start, count) in &found[..num_found] {
                let middle = start + a_len;
                // In a run of one token ("aaa", a pair at 0 and at 1), the merge at 0 has ended the
                // pair at 1 since it was read.
                if cells[start].token != a || cells[middle].token != b {
                    continue;
                }
                let end = middle + b_len;
                for inside in [start, middle - 1, middle, end - 1] {
                    cells[inside].token = INSIDE;
                }
                cells[start].token = merged;
                cells[end - 1].token = merged;
                for (neighbours, cell) in [(&mut *left, start - 1), (&mut *right, end)] {
                    if cells[cell].token != WORD_END {
                        neighbours.add(cells[cell].token, start as u32, count);
                    }
                }
            }
        }
    }
}

/// How often a pair occurs, and the index of its range of positions.
#[derive(Clone, Copy, Default)]
struct Pair {
    count: u64,
    index: u32,
}

/// A pair's count and ids; the greatest is merged next. The count may be out of date, but only too
/// high, because the count of a pair never rises after the merge that created it.
type Candidate = (u64, Reverse<(u32, u32)>);

struct Trainer {
    arena: Arena,
    /// In bytes, by id.
    token_lens: Vec<u32>,
    pairs: PairMap<Pair>,
    /// Which of `positions` belong to each pair.
    ranges: Vec<Range<usize>>,
    /// Where each pair begins, ascending within a pair. A position stays when another merge takes
    /// one of the tokens there, so each is checked before use: that is cheaper than removing it.
    positions: Vec<u32>,
    /// The pairs that occur at least `queued_count` times. Most pairs never become frequent enough
    /// to be merged, and a queue of all would be many times as large.
    queue: BinaryHeap<Candidate>,
    queued_count: u64,
    /// Of the current merge; kept for their memory.
    left: Neighbours,
    right: Neighbours,
}

impl Trainer {
    fn new(arena: Arena) -> Self {
        let mut trainer = Self {
            arena,
            token_lens: vec![1; 256],
            pairs: PairMap::new(),
            ranges: Vec::new(),
            positions: Vec::new(),
            queue: BinaryHeap::new(),
            queued_count: u64::MAX,
            left: Neighbours::default(),
            right: Neighbours::default(),
        };
        trainer.add_byte_pairs();
        trainer
    }

    /// Adds all pairs of bytes, with two passes over the words: the first counts, so that the second
    /// can write each position to its place (a counting sort).
    fn add_byte_pairs(&mut self) {
        let mut counts = vec![(0, 0); 1 << 16]; // occurrences in the text, positions in the arena
        self.arena.byte_pairs(|_, index, count| {
            counts[index].0 += count;
            counts[index].1 += 1;
        });
        let mut ends = vec![0; 1 << 16]; // where the next position of each pair goes
        let mut len = 0;
        for (index, &(count, places)) in counts.iter().enumerate() {
            if places > 0 {
                let ids = ((index >> 8) as u32, (index & 0xFF) as u32);
                self.add_pair(ids, count, len..len + places);
            }
            ends[index] = len;
            len += places;
        }
        self.positions = vec![0; len];
        self.arena.byte_pairs(|position, index, _| {
            self.positions[ends[index]] = position;
            ends[index] += 1;
        });
    }

    fn add_pair(&mut self, ids: (u32, u32), count: u64, positions: Range<usize>) {
        let index = self.ranges.len() as u32;
        self.ranges.push(positions);
        self.pairs.insert(ids.0, ids.1, Pair { count, index });
        if count >= self.queued_count {
            self.queue.push((count, Reverse(ids)));
        }
    }

    /// Merges the most frequent pair everywhere and returns it. None if no pair is left.
    fn merge_most_frequent(&mut self) -> Option<(u32, u32)> {
        loop {
            let Some((count, Reverse(ids))) = self.queue.pop() else {
                if self.queued_count == 1 {
                    return None;
                }
                self.queue_less_frequent();
                continue;
            };
            let pair = self.pair(ids);
            let now = *pair;
            if now.count == count {
                pair.count = 0;
                self.merge(ids, now.index);
                return Some(ids);
            }
            // The count was out of date: queue the pair again, unless it has become too rare.
            if now.count >= self.queued_count {
                self.queue.push((now.count, Reverse(ids)));
            }
        }
    }

    /// Queues the pairs down to half the previous count. Called when the queue is empty, so all of
    /// the more frequent pairs are merged.
    fn queue_less_frequent(&mut self) {
        let counts = self.queued_count / 2..self.queued_count;
        self.queued_count = counts.start;
        let queued = self.pairs.iter().filter(|(_, pair)| counts.contains(&pair.count));
        self.queue = queued.map(|(ids, pair)| (pair.count, Reverse(ids))).collect();
    }

    fn pair(&mut self, (left, right): (u32, u32)) -> &mut Pair {
        self.pairs.get_mut(left, right).expect("a pair that was added")
    }

    fn merge(&mut self, ids: (u32, u32), index: u32) {
        let lens = (self.token_lens[ids.0 as usize], self.token_lens[ids.1 as usize]);
        let merged = self.token_lens.len() as u32;
        let job = Job { ids, lens, merged };
        self.token_lens.push(lens.0 + lens.1);
        self.left.clear(merged);
        self.right.clear(merged);
        let positions = &self.positions[self.ranges[index as usize].clone()];
        self.arena.merge(job, positions, &mut self.left, &mut self.right);
        self.update_counts(job);
    }

    /// Around each merged pair (l a b r), the pairs (l a) and (b r) became (l m) and (m r).
    fn update_counts(&mut self, Job { ids: (a, b), merged, .. }: Job) {
        let (mut left, mut right) =
            (std::mem::take(&mut self.left), std::mem::take(&mut self.right));
        // Pairs that disappeared. The merged pair itself, in runs like a b a b, has count 0 already.
        for group in &left.groups {
            // The left neighbour is the new token (a b a b became m m). Its right neighbour was
            // still an a when it was merged, so what it added as (m a) is taken off again.
            if group.token == merged {
                right.subtract(a, group.count);
            } else if (group.token, a) != (a, b) {
                self.pair((group.token, a)).count -= group.count;
            }
        }
        for group in &right.groups {
            if (b, group.token) != (a, b) {
                self.pair((b, group.token)).count -= group.total;
            }
        }
        // Pairs that the new token forms. (l m) begins where l begins, (m r) where m begins.
        left.place(&mut self.positions, |token| self.token_lens[token as usize]);
        right.place(&mut self.positions, |_| 0);
        for group in &left.groups {
            self.add_pair((group.token, merged), group.count, group.positions.clone());
        }
        for group in right.groups.iter().filter(|group| group.count > 0) {
            self.add_pair((merged, group.token), group.count, group.positions.clone());
        }
        (self.left, self.right) = (left, right);
    }
}

/// The tokens on one side of the places where a pair was merged, in a group for each token.
#[derive(Default)]
struct Neighbours {
    /// Number of a token's group, or NO_GROUP.
    group_of_token: Vec<u32>,
    groups: Vec<Group>,
    /// Number of the group and position of the merged pair, in the order of the arena.
    occurrences: Vec<(u32, u32)>,
}

struct Group {
    token: u32,
    /// Occurrences in the text.
    total: u64,
    /// The same, without those taken off since.
    count: u64,
    /// Until the positions have a place, `0..` their number.
    positions: Range<usize>,
}

const NO_GROUP: u32 = u32::MAX;

impl Neighbours {
    /// Empties it, and makes room for tokens up to `last`. The time depends on the groups it had,
    /// not on the number of tokens.
    fn clear(&mut self, last: u32) {
        for group in self.groups.drain(..) {
            self.group_of_token[group.token as usize] = NO_GROUP;
        }
        self.group_of_token.resize(last as usize + 1, NO_GROUP);
        self.occurrences.clear();
    }

    /// Adds a neighbour of the pair merged at `position` in a word that occurred `count` times.
    #[inline(always)]
    fn add(&mut self, token: u32, position: u32, count: u64) {
        let number = &mut self.group_of_token[token as usize];
        if *number == NO_GROUP {
            *number = self.groups.len() as u32;
            self.groups.push(Group { token, total: 0, count: 0, positions: 0..0 });
        }
        let group = &mut self.groups[*number as usize];
        group.total += count;
        group.count += count;
        group.positions.end += 1;
        self.occurrences.push((*number, position));
    }

    fn subtract(&mut self, token: u32, count: u64) {
        let number = self.group_of_token[token as usize];
        self.groups[number as usize].count -= count;
    }

    /// Appends the positions of the new pairs to `positions`, those of a group together, and sets
    /// the groups' ranges (a counting sort). A new pair begins `before(token)` bytes before the
    /// merged one.
    fn place(&mut self, positions: &mut Vec<u32>, before: impl Fn(u32) -> u32) {
        let mut start = positions.len();
        for group in &mut self.groups {
            let len = group.positions.len();
            group.positions = start..start;
            start += len;
        }
        positions.resize(start, 0);
        for &(number, position) in &self.occurrences {
            let group = &mut self.groups[number as usize];
            positions[group.positions.end] = position - before(group.token);
            group.positions.end += 1;
        }
    }
}
