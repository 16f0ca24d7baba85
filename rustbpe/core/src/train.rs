//! Learning merges from counted words.
//!
//! All distinct words lie in one arena, a cell per byte. A token covers as many cells as it has
//! bytes; its first and its last cell carry its id, those between carry none. So the neighbours of
//! a token are found by its length alone, and a merge writes at most four cells.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use crate::count::{WordCounts, WordPart};
use crate::hash::PairMap;
use crate::parallel::{Helpers, map_in_threads, with_helpers};

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
/// called before every merge; an error from it ends the training. The words are shared between as
/// many threads as counted them, of which [`MAX_PARTS`] are used; the merges do not depend on it.
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
    let parts = map_in_threads(words.into_parts(MAX_PARTS), |words| Part::new(words, &id_of_byte));
    if parts.iter().map(|part| part.cells.len()).sum::<usize>() > u32::MAX as usize {
        return Err(TrainError::TooManyWords);
    }
    let byte_or_merge = |id: u32| bytes.get(id as usize).map_or(id, |&byte| byte as u32);
    with_helpers(parts.len() - 1, Share::merge, |helpers| {
        let mut trainer = Trainer::new(parts, helpers);
        let mut merges = Vec::new();
        while merges.len() < num_merges {
            observe(merges.len()).map_err(TrainError::Stopped)?;
            let Some((left, right)) = trainer.merge_most_frequent() else {
                break;
            };
            merges.push((byte_or_merge(left), byte_or_merge(right)));
        }
        Ok(merges)
    })
}

/// One byte of a word, or the end of one.
#[derive(Clone, Copy)]
struct Cell {
    token: u32,
    word: u32,
}

const WORD_END: u32 = u32::MAX;
const INSIDE: u32 = u32::MAX - 1;
/// Positions looked at together.
const BATCH: usize = 32;

/// Threads beyond these would wait for one another.
const MAX_PARTS: usize = 4;
/// A pair of fewer positions is merged before a helper would have begun. Tests share nearly all.
const SHARED_POSITIONS: usize = if cfg!(debug_assertions) { 2 } else { 128 };

/// A merge: the two tokens, their lengths, and the token that they become.
#[derive(Clone, Copy, Default)]
struct Job {
    ids: (u32, u32),
    lens: (u32, u32),
    merged: u32,
}

/// Some of the words. Positions are numbered through all parts.
#[derive(Default)]
struct Part {
    cells: Vec<Cell>,
    word_counts: Vec<u64>,
    /// How often each pair of bytes occurs, and in how many places: index left id << 8 | right id.
    byte_pairs: Vec<(u64, usize)>,
    /// Position of the first cell.
    first: u32,
}

impl Part {
    fn new(words: WordPart, id_of_byte: &[u32; 256]) -> Self {
        let mut word_counts = Vec::new();
        let mut byte_pairs = vec![(0, 0); 1 << 16];
        let mut cells = vec![Cell { token: WORD_END, word: 0 }];
        words.into_words(|bytes, count| {
            if bytes.len() < 2 {
                return;
            }
            let word = word_counts.len() as u32;
            word_counts.push(count);
            for pair in bytes.windows(2) {
                let id = |byte: u8| id_of_byte[byte as usize] as usize;
                let (total, places) = &mut byte_pairs[id(pair[0]) << 8 | id(pair[1])];
                *total += count;
                *places += 1;
            }
            let tokens = bytes.iter().map(|&byte| id_of_byte[byte as usize]);
            cells.extend(tokens.chain([WORD_END]).map(|token| Cell { token, word }));
        });
        Self { cells, word_counts, byte_pairs, first: 0 }
    }

    /// The first of ascending positions, those in this part, and the others.
    fn split<'p>(&self, positions: &'p [u32]) -> (&'p [u32], &'p [u32]) {
        let last = self.first + (self.cells.len() - 1) as u32;
        positions.split_at(positions.partition_point(|&position| position <= last))
    }

    /// Merges the pair at those of `positions`, ascending, at which it still is.
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
            // All of a batch are read before one is changed: the processor waits for memory once.
            let mut found = [(0, 0); BATCH];
            let mut num_found = 0;
            for &position in batch {
                let start = (position - self.first) as usize;
                let cell = cells[start];
                found[num_found] = (start, self.word_counts[cell.word as usize]);
                num_found += usize::from((cell.token == a) & (cells[start + a_len].token == b));
            }
            for &(start, count) in &found[..num_found] {
                let middle = start + a_len;
                // In a run of one token, a merge ends the pair that begins with its second half.
                if cells[start].token != a || cells[middle].token != b {
                    continue;
                }
                let end = middle + b_len;
                for inside in [start, middle - 1, middle, end - 1] {
                    cells[inside].token = INSIDE;
                }
                cells[start].token = merged;
                cells[end - 1].token = merged;
                let position = self.first + start as u32;
                for (neighbours, cell) in [(&mut *left, start - 1), (&mut *right, end)] {
                    if cells[cell].token != WORD_END {
                        neighbours.add(cells[cell].token, position, count);
                    }
                }
            }
        }
    }
}

/// What a helper does of a merge.
#[derive(Default)]
struct Share {
    part: Part,
    job: Job,
    positions: Vec<u32>,
    left: Neighbours,
    right: Neighbours,
}

impl Share {
    fn merge(&mut self) {
        self.left.clear(self.job.merged);
        self.right.clear(self.job.merged);
        self.part.merge(self.job, &self.positions, &mut self.left, &mut self.right);
    }
}

/// How often a pair occurs, and which of the ranges is its own.
#[derive(Clone, Copy, Default)]
struct Pair {
    count: u64,
    index: u32,
}

/// A pair's count and ids, the next to merge greatest. The count may be too high, never too low, as
/// a pair's count only falls once it is made.
type Candidate = (u64, Reverse<(u32, u32)>);

struct Trainer<'a> {
    parts: Vec<Part>,
    helpers: &'a Helpers<Share>,
    /// One for each helper, empty.
    shares: Vec<Share>,
    token_lens: Vec<u32>,
    pairs: PairMap<Pair>,
    /// Where a pair began once. A position stays when the pair there is gone, so each is checked
    /// before use.
    ranges: Vec<Range<usize>>,
    /// All positions of all pairs, of each pair ascending.
    positions: Vec<u32>,
    /// The pairs of at least `queued_count`. Most pairs are never frequent enough to be merged.
    queue: BinaryHeap<Candidate>,
    queued_count: u64,
    left: Neighbours,
    right: Neighbours,
}

impl<'a> Trainer<'a> {
    fn new(mut parts: Vec<Part>, helpers: &'a Helpers<Share>) -> Self {
        let mut first = 0;
        for part in &mut parts {
            part.first = first;
            first += part.cells.len() as u32;
        }
        let mut trainer = Self {
            shares: parts[1..].iter().map(|_| Share::default()).collect(),
            parts,
            helpers,
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

    fn add_byte_pairs(&mut self) {
        let mut ends = vec![0; 1 << 16];
        let mut len = 0;
        for (i, end) in ends.iter_mut().enumerate() {
            let byte_pairs = self.parts.iter().map(|part| part.byte_pairs[i]);
            let (count, places) = byte_pairs.fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
            if places > 0 {
                self.add_pair(((i >> 8) as u32, (i & 0xFF) as u32), count, len..len + places);
            }
            *end = len;
            len += places;
        }
        self.positions = vec![0; len];
        for part in &self.parts {
            for (position, pair) in (part.first..).zip(part.cells.windows(2)) {
                let (left, right) = (pair[0].token, pair[1].token);
                if left != WORD_END && right != WORD_END {
                    let end = &mut ends[(left << 8 | right) as usize];
                    self.positions[*end] = position;
                    *end += 1;
                }
            }
        }
    }

    fn add_pair(&mut self, ids: (u32, u32), count: u64, positions: Range<usize>) {
        let index = self.ranges.len() as u32;
        self.ranges.push(positions);
        self.pairs.insert(ids.0, ids.1, Pair { count, index });
        if count >= self.queued_count {
            self.queue.push((count, Reverse(ids)));
        }
    }

    /// Merges the most frequent pair everywhere. None if no pair is left.
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
            if now.count >= self.queued_count {
                self.queue.push((now.count, Reverse(ids)));
            }
        }
    }

    /// When all of the queue are merged: queues the pairs down to half the count.
    fn queue_less_frequent(&mut self) {
        let counts = self.queued_count / 2..self.queued_count;
        self.queued_count = counts.start;
        let queued = self.pairs.iter().filter(|(_, pair)| counts.contains(&pair.count));
        self.queue = queued.map(|(ids, pair)| (pair.count, Reverse(ids))).collect();
    }

    fn pair(&mut self, (left, right): (u32, u32)) -> &mut Pair {
        self.pairs.get_mut(left, right).expect("a pair that was seen")
    }

    fn merge(&mut self, ids: (u32, u32), index: u32) {
        let lens = (self.token_lens[ids.0 as usize], self.token_lens[ids.1 as usize]);
        let merged = self.token_lens.len() as u32;
        let job = Job { ids, lens, merged };
        self.token_lens.push(lens.0 + lens.1);
        self.left.clear(merged);
        self.right.clear(merged);
        let positions = &self.positions[self.ranges[index as usize].clone()];
        let is_shared = positions.len() >= SHARED_POSITIONS;
        let (first, others) = self.parts.split_first_mut().expect("a part");
        let (own, mut rest) = first.split(positions);
        if !is_shared {
            first.merge(job, own, &mut self.left, &mut self.right);
        }
        for (number, part) in others.iter_mut().enumerate() {
            let positions;
            (positions, rest) = part.split(rest);
            if is_shared {
                let mut share = self.shares.pop().expect("one for each helper");
                share.job = job;
                share.positions.clear();
                share.positions.extend_from_slice(positions);
                share.part = std::mem::take(part);
                self.helpers.start(number, share);
            } else {
                part.merge(job, positions, &mut self.left, &mut self.right);
            }
        }
        if is_shared {
            first.merge(job, own, &mut self.left, &mut self.right);
            for (number, part) in others.iter_mut().enumerate() {
                let mut share = self.helpers.finish(number);
                *part = std::mem::take(&mut share.part);
                self.left.add_all(&share.left);
                self.right.add_all(&share.right);
                self.shares.push(share);
            }
        }
        self.update_counts(job);
    }

    /// Around each merged pair (l a b r), pairs (l a) and (b r) became (l m) and (m r).
    fn update_counts(&mut self, Job { ids: (a, b), merged, .. }: Job) {
        let (mut left, mut right) =
            (std::mem::take(&mut self.left), std::mem::take(&mut self.right));
        for group in &left.groups {
            // A pair (m a), seen as the merge to its left was made, is gone with this one.
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

/// The tokens on one side of the occurrences of a merged pair.
#[derive(Default)]
struct Neighbours {
    /// Number of a token's group, or NO_GROUP.
    group_of_token: Vec<u32>,
    groups: Vec<Group>,
    /// Group and position of the merged pair, in the order of the text.
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
    fn add(&mut self, token: u32, position: u32, count: u64) {
        let number = self.add_to_group(token, 1, count, count);
        self.occurrences.push((number, position));
    }

    /// Number of the token's group, of a new one if it had none.
    #[inline(always)]
    fn add_to_group(&mut self, token: u32, positions: usize, total: u64, count: u64) -> u32 {
        let number = &mut self.group_of_token[token as usize];
        if *number == NO_GROUP {
            *number = self.groups.len() as u32;
            self.groups.push(Group { token, total: 0, count: 0, positions: 0..0 });
        }
        let group = &mut self.groups[*number as usize];
        group.total += total;
        group.count += count;
        group.positions.end += positions;
        *number
    }

    /// Adds the neighbours in later text.
    fn add_all(&mut self, other: &Self) {
        let add = |g: &Group| self.add_to_group(g.token, g.positions.len(), g.total, g.count);
        let numbers: Vec<u32> = other.groups.iter().map(add).collect();
        let occurrences = other.occurrences.iter();
        self.occurrences.extend(occurrences.map(|&(n, position)| (numbers[n as usize], position)));
    }

    fn subtract(&mut self, token: u32, count: u64) {
        let number = self.group_of_token[token as usize];
        self.groups[number as usize].count -= count;
    }

    /// Appends the positions of the new pairs to `positions`, those of each group together, and
    /// sets the ranges; a pair begins `before(token)` bytes before the merged one.
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
