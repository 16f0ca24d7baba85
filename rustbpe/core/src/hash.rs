//! Hashing of words and of pairs, and the table of pairs.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Longest word that fits a [`short_key`].
pub const MAX_SHORT: usize = 15;

/// The bytes `start..end` of `text` and their number as one integer, if there are at most
/// [`MAX_SHORT`]. Different words have different keys, and no word has key 0.
#[inline(always)]
pub fn short_key(text: &[u8], start: usize, end: usize) -> Option<u128> {
    let len = end - start;
    if len > MAX_SHORT {
        return None;
    }
    let bytes = match text.get(start..start + 16) {
        Some(bytes) => u128::from_le_bytes(bytes.try_into().expect("16 bytes")),
        None => {
            let mut bytes = [0; 16];
            bytes[..len].copy_from_slice(&text[start..end]);
            u128::from_le_bytes(bytes)
        }
    };
    let mask = (1 << (8 * len)) - 1;
    Some(bytes & mask | (len as u128) << 120)
}

/// The word of a [`short_key`].
pub fn short_word(key: u128) -> ([u8; 16], usize) {
    let bytes = key.to_le_bytes();
    (bytes, bytes[15] as usize)
}

/// 64 well mixed bits of a key: both halves of the product of its halves (as in wyhash).
#[inline(always)]
pub fn hash_short(key: u128) -> u64 {
    let product = (key as u64 ^ 0x9E37_79B9_7F4A_7C15) as u128
        * ((key >> 64) as u64 ^ 0xD6E8_FEB8_6659_FD93) as u128;
    product as u64 ^ (product >> 64) as u64
}

/// Hashes byte strings, 16 bytes a step, and short keys.
#[derive(Default)]
pub struct FastHasher(u64);

impl Hasher for FastHasher {
    fn write_u128(&mut self, key: u128) {
        self.0 = hash_short(key);
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(16) {
            let mut padded = [0; 16];
            padded[..chunk.len()].copy_from_slice(chunk);
            let key = u128::from_le_bytes(padded) ^ self.0 as u128;
            self.0 = hash_short(key).rotate_left(23) ^ chunk.len() as u64;
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A map from byte strings or short keys.
pub type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<FastHasher>>;

/// A map from pairs of ids, none of them u32::MAX, open addressing with linear probing.
pub struct PairMap<V> {
    slots: Vec<(u64, V)>,
    len: usize,
}

const EMPTY: u64 = u64::MAX;

impl<V: Copy + Default> PairMap<V> {
    pub fn new() -> Self {
        Self::with_slots(1 << 10)
    }

    fn with_slots(slots: usize) -> Self {
        Self { slots: vec![(EMPTY, V::default()); slots], len: 0 }
    }

    /// Index of the slot of `key`, or of the empty one where it belongs.
    #[inline(always)]
    fn slot(&self, key: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = hash_short(key as u128) as usize & mask;
        while self.slots[at].0 != key && self.slots[at].0 != EMPTY {
            at = (at + 1) & mask;
        }
        at
    }

    #[inline(always)]
    pub fn get(&self, left: u32, right: u32) -> Option<V> {
        let key = pair_key(left, right);
        let (found, value) = self.slots[self.slot(key)];
        (found == key).then_some(value)
    }

    #[inline(always)]
    pub fn get_mut(&mut self, left: u32, right: u32) -> Option<&mut V> {
        let key = pair_key(left, right);
        let at = self.slot(key);
        let (found, value) = &mut self.slots[at];
        (*found == key).then_some(value)
    }

    /// All pairs and their values, in no certain order.
    pub fn iter(&self) -> impl Iterator<Item = ((u32, u32), V)> {
        let pairs = self.slots.iter().filter(|slot| slot.0 != EMPTY);
        pairs.map(|&(key, value)| (((key >> 32) as u32, key as u32), value))
    }

    /// Adds a pair or replaces its value.
    pub fn insert(&mut self, left: u32, right: u32, value: V) {
        if 3 * self.len >= 2 * self.slots.len() {
            let mut larger = Self::with_slots(2 * self.slots.len());
            for &(key, value) in self.slots.iter().filter(|slot| slot.0 != EMPTY) {
                let at = larger.slot(key);
                larger.slots[at] = (key, value);
            }
            larger.len = self.len;
            *self = larger;
        }
        let key = pair_key(left, right);
        let at = self.slot(key);
        self.len += usize::from(self.slots[at].0 == EMPTY);
        self.slots[at] = (key, value);
    }
}

#[inline(always)]
fn pair_key(left: u32, right: u32) -> u64 {
    (left as u64) << 32 | right as u64
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn short_keys_are_the_words() {
        let text = b"a word and another, longer one";
        for start in 0..text.len() {
            for end in start + 1..=text.len().min(start + MAX_SHORT) {
                let (bytes, len) = short_word(short_key(text, start, end).unwrap());
                assert_eq!(&bytes[..len], &text[start..end]);
            }
        }
        assert_eq!(short_key(text, 0, 16), None);
        assert_ne!(short_key(b"a", 0, 1), short_key(b"a\0", 0, 2));
    }

    #[test]
    fn pairs_are_found_again() {
        let mut map = PairMap::new();
        for i in 0..5000 {
            map.insert(i % 71, i, i);
        }
        map.insert(0, 0, 7);
        assert_eq!(map.get(0, 0), Some(7));
        assert!((1..5000).all(|i| map.get(i % 71, i) == Some(i)));
        assert_eq!(map.get(1, 0), None);
        *map.get_mut(0, 0).unwrap() += 1;
        assert_eq!(map.get(0, 0), Some(8));
        assert_eq!(map.get_mut(1, 0), None);
        let all: BTreeSet<_> = map.iter().collect();
        assert_eq!(all.len(), 5000);
        assert!(all.contains(&((70, 4969), 4969)) && all.contains(&((0, 0), 8)));
    }
}
