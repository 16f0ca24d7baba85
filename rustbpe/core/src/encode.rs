//! Encoding text: each piece becomes tokens by merging, lowest rank first, leftmost first.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::hash::{PairMap, hash_short, short_key};
use crate::parallel::{blocks, for_each_task};
use crate::split::Split;
use crate::vocab::Vocab;

/// Work unit of a thread.
const BLOCK_BYTES: usize = 1 << 16;
/// Longer pieces are merged with a heap, in n log n steps; shorter ones faster without, in n^2.
const MAX_SCAN: usize = 48;
const NO_RANK: u32 = u32::MAX;

/// The token ids of consecutive texts.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    pub tokens: Vec<u32>,
    /// Text `i` ends before token `ends[i]`.
    pub ends: Vec<usize>,
}

/// A vocabulary made ready to encode. Threads may share it.
pub struct Encoder {
    vocab: Arc<Vocab>,
    rank_of_byte: [u32; 256],
    /// Rank of each two bytes, the first one high; NO_RANK where they are no token.
    rank_of_bytes: Vec<u32>,
    /// Rank of each two tokens that together are a token.
    pairs: PairMap<u32>,
    caches: Mutex<Vec<Cache>>,
}

impl Encoder {
    pub fn new(vocab: Arc<Vocab>) -> Self {
        let mut pairs = PairMap::new();
        for rank in 0..vocab.len() as u32 {
            let token = vocab.token(rank);
            for middle in 1..token.len() {
                let (left, right) = token.split_at(middle);
                if let (Some(left), Some(right)) = (vocab.rank(left), vocab.rank(right)) {
                    pairs.insert(left, right, rank);
                }
            }
        }
        let rank_of_byte =
            std::array::from_fn(|byte| vocab.rank(&[byte as u8]).expect("all bytes are tokens"));
        let rank_of_bytes = (0..1usize << 16)
            .map(|two| pairs.get(rank_of_byte[two >> 8], rank_of_byte[two & 0xFF]))
            .map(|rank| rank.unwrap_or(NO_RANK))
            .collect();
        Self { vocab, rank_of_byte, rank_of_bytes, pairs, caches: Mutex::default() }
    }

    pub fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    /// The ids of one text.
    pub fn encode<S: Split>(&self, splitter: &S, text: &str) -> Result<Vec<u32>, S::Error> {
        let mut cache = self.take_cache();
        let mut ids = Vec::with_capacity(text.len() / 4);
        let result = self.encode_text(splitter, text, &mut cache, &mut ids);
        self.give_back(cache);
        result.map(|()| ids)
    }

    /// The ids of all texts, in blocks of consecutive texts, with `num_threads` threads.
    pub fn encode_batch<S: Split>(
        &self,
        splitter: &S,
        texts: &[&str],
        num_threads: usize,
    ) -> Result<Vec<Encoded>, S::Error> {
        let blocks = blocks(texts, BLOCK_BYTES);
        let num_threads = num_threads.min(blocks.len()).max(1);
        let mut workers: Vec<(Cache, Vec<(usize, Encoded)>)> =
            (0..num_threads).map(|_| (self.take_cache(), Vec::new())).collect();
        let result = for_each_task(&mut workers, blocks.len(), |(cache, done), block| {
            let mut encoded = Encoded::default();
            for text in &texts[blocks[block].clone()] {
                self.encode_text(splitter, text, cache, &mut encoded.tokens)?;
                encoded.ends.push(encoded.tokens.len());
            }
            done.push((block, encoded));
            Ok(())
        });
        let mut all = Vec::with_capacity(blocks.len());
        for (cache, done) in workers {
            self.give_back(cache);
            all.extend(done);
        }
        result?;
        all.sort_unstable_by_key(|&(block, _)| block);
        Ok(all.into_iter().map(|(_, encoded)| encoded).collect())
    }

    fn take_cache(&self) -> Cache {
        let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        caches.pop().unwrap_or_else(Cache::new)
    }

    fn give_back(&self, cache: Cache) {
        let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        caches.push(cache);
    }

    #[inline(always)]
    fn encode_text<S: Split>(
        &self,
        splitter: &S,
        text: &str,
        cache: &mut Cache,
        out: &mut Vec<u32>,
    ) -> Result<(), S::Error> {
        let bytes = text.as_bytes();
        splitter.split(text, |start, end| {
            let piece = &bytes[start..end];
            let Some(key) = short_key(bytes, start, end) else {
                return self.encode_piece(piece, self.vocab.rank(piece), out);
            };
            let slot = cache.slot(key);
            if slot.key == key {
                match slot.len {
                    1 => out.push(slot.ids[0]),
                    len => out.extend_from_slice(&slot.ids[..len as usize]),
                }
                return;
            }
            let before = out.len();
            self.encode_piece(piece, self.vocab.short_rank(key), out);
            slot.set(key, &out[before..]);
        })
    }

    /// Adds the ids of a piece, whose own rank is `rank` if it is a token.
    #[inline(never)]
    fn encode_piece(&self, piece: &[u8], rank: Option<u32>, out: &mut Vec<u32>) {
        if let Some(rank) = rank {
            out.push(rank);
        } else if piece.len() <= MAX_SCAN {
            self.merge_by_scan(piece, out);
        } else {
            self.merge_by_heap(piece, out);
        }
    }

    #[inline(always)]
    fn pair_rank(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(left, right).unwrap_or(NO_RANK)
    }

    fn byte_pair_rank(&self, pair: &[u8]) -> u32 {
        self.rank_of_bytes[(pair[0] as usize) << 8 | pair[1] as usize]
    }

    /// Searches all pairs for the lowest rank after each merge.
    fn merge_by_scan(&self, piece: &[u8], out: &mut Vec<u32>) {
        let mut ids = [0; MAX_SCAN];
        let mut ranks = [NO_RANK; MAX_SCAN]; // of the pair that begins there
        let mut len = piece.len();
        for (id, &byte) in ids.iter_mut().zip(piece) {
            *id = self.rank_of_byte[byte as usize];
        }
        for (rank, pair) in ranks.iter_mut().zip(piece.windows(2)) {
            *rank = self.byte_pair_rank(pair);
        }
        while len > 1 {
            let (mut at, mut lowest) = (0, NO_RANK);
            for (i, &rank) in ranks[..len - 1].iter().enumerate() {
                if rank < lowest {
                    (at, lowest) = (i, rank);
                }
            }
            if lowest == NO_RANK {
                break;
            }
            ids[at] = lowest;
            ids.copy_within(at + 2..len, at + 1);
            ranks.copy_within(at + 1..len, at);
            len -= 1;
            if at + 1 < len {
                ranks[at] = self.pair_rank(ids[at], ids[at + 1]);
            }
            if at > 0 {
                ranks[at - 1] = self.pair_rank(ids[at - 1], ids[at]);
            }
        }
        out.extend_from_slice(&ids[..len]);
    }

    /// Keeps the ranks in a heap; what a merge made stale is skipped when it comes up.
    fn merge_by_heap(&self, piece: &[u8], out: &mut Vec<u32>) {
        let end = piece.len();
        let mut parts: Vec<Part> = (0..end)
            .map(|i| Part {
                id: self.rank_of_byte[piece[i] as usize],
                rank: piece.get(i..i + 2).map_or(NO_RANK, |pair| self.byte_pair_rank(pair)),
                previous: i.wrapping_sub(1),
                next: i + 1,
            })
            .collect();
        let ranked = |parts: &[Part], at: usize| Reverse((parts[at].rank, at));
        let mut heap: BinaryHeap<_> =
            (0..end).filter(|&at| parts[at].rank != NO_RANK).map(|at| ranked(&parts, at)).collect();
        while let Some(Reverse((rank, at))) = heap.pop() {
            if parts[at].rank != rank {
                continue;
            }
            let merged = parts[at].next;
            let next = parts[merged].next;
            parts[merged].rank = NO_RANK;
            parts[at].id = rank;
            parts[at].next = next;
            if next < end {
                parts[next].previous = at;
            }
            let previous = parts[at].previous;
            for (left, right) in [(previous, at), (at, next)] {
                if left < end {
                    parts[left].rank = match right < end {
                        true => self.pair_rank(parts[left].id, parts[right].id),
                        false => NO_RANK,
                    };
                    if parts[left].rank != NO_RANK {
                        heap.push(ranked(&parts, left));
                    }
                }
            }
        }
        let mut at = 0;
        while at < end {
            out.push(parts[at].id);
            at = parts[at].next;
        }
    }
}

/// A token of a piece under merging; neighbours beyond the ends are no index of a part.
struct Part {
    id: u32,
    /// Rank of the pair with the next part.
    rank: u32,
    previous: usize,
    next: usize,
}

/// Ids of short pieces seen before, each in the one slot of its hash: bounded and exact.
struct Cache {
    slots: Vec<Slot>,
}

/// Two fill a cache line.
#[derive(Clone, Copy)]
struct Slot {
    key: u128, // no piece has key 0
    len: u32,
    ids: [u32; 3],
}

impl Cache {
    /// 8 MB.
    const SLOTS: usize = 1 << 18;

    fn new() -> Self {
        let empty = Slot { key: 0, len: 0, ids: [0; 3] };
        Self { slots: vec![empty; Self::SLOTS] }
    }

    #[inline(always)]
    fn slot(&mut self, key: u128) -> &mut Slot {
        &mut self.slots[hash_short(key) as usize % Self::SLOTS]
    }
}

impl Slot {
    fn set(&mut self, key: u128, ids: &[u32]) {
        if let Some(place) = self.ids.get_mut(..ids.len()) {
            place.copy_from_slice(ids);
            self.len = ids.len() as u32;
            self.key = key;
        }
    }
}
