//! A vocabulary: byte strings by rank.

use std::fmt;

use crate::hash::{FastMap, short_key};
use crate::train::Merge;

/// The tokens of a byte-level vocabulary; a token's rank is its id.
pub struct Vocab {
    bytes: Vec<u8>,
    /// Token `i` is `bytes[starts[i]..starts[i + 1]]`.
    starts: Vec<usize>,
    short_ranks: FastMap<u128, u32>,
    long_ranks: FastMap<Box<[u8]>, u32>,
}

/// Why tokens and ranks are no vocabulary.
#[derive(Debug, PartialEq, Eq)]
pub enum VocabError {
    /// A rank of two tokens.
    DoubledRank(u32),
    /// A token of two ranks.
    DoubledToken(Vec<u8>),
    /// The ranks below the number of tokens that no token has.
    MissingRanks(Vec<u32>),
    /// The bytes that are no tokens.
    MissingBytes(Vec<u8>),
    /// The rank of a token without bytes.
    EmptyToken(u32),
}

impl fmt::Display for VocabError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DoubledRank(rank) => write!(f, "rank {rank} belongs to more than one token"),
            Self::DoubledToken(token) => {
                write!(f, "token b\"{}\" has more than one rank", token.escape_ascii())
            }
            Self::MissingRanks(ranks) => {
                write!(f, "ranks must be 0, 1, 2, ... without gaps; missing: ")?;
                list(f, ranks, |f, rank| write!(f, "{rank}"))
            }
            Self::MissingBytes(bytes) => {
                write!(f, "each of the bytes 0 to 255 must be a token; missing: ")?;
                list(f, bytes, |f, byte| write!(f, "{byte}"))
            }
            Self::EmptyToken(rank) => write!(f, "the token of rank {rank} has no bytes"),
        }
    }
}

/// The first eight, and how many more there are.
fn list<T>(
    f: &mut fmt::Formatter<'_>,
    items: &[T],
    item: impl Fn(&mut fmt::Formatter<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    let shown = items.len().min(8);
    for (i, one) in items[..shown].iter().enumerate() {
        write!(f, "{}", if i > 0 { ", " } else { "" })?;
        item(f, one)?;
    }
    match items.len() - shown {
        0 => Ok(()),
        more => write!(f, " and {more} more"),
    }
}

impl Vocab {
    /// From tokens and their ranks, in any order.
    pub fn from_ranks<T: AsRef<[u8]>>(ranks: &[(T, u32)]) -> Result<Self, VocabError> {
        let mut by_rank: Vec<Option<&[u8]>> = vec![None; ranks.len()];
        let mut out_of_range = false;
        for (token, rank) in ranks {
            match by_rank.get_mut(*rank as usize) {
                Some(Some(_)) => return Err(VocabError::DoubledRank(*rank)),
                Some(place) => *place = Some(token.as_ref()),
                None => out_of_range = true,
            }
        }
        if out_of_range {
            let missing = (0..).zip(&by_rank).filter(|(_, token)| token.is_none());
            let missing = missing.map(|(rank, _)| rank).collect();
            return Err(VocabError::MissingRanks(missing));
        }
        Self::from_tokens(by_rank.into_iter().flatten())
    }

    /// The bytes, then a token for each merge.
    pub fn from_merges(merges: &[Merge]) -> Result<Self, VocabError> {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for &(left, right) in merges {
            tokens.push([&tokens[left as usize][..], &tokens[right as usize]].concat());
        }
        Self::from_tokens(tokens.iter().map(Vec::as_slice))
    }

    fn from_tokens<'a>(tokens: impl Iterator<Item = &'a [u8]>) -> Result<Self, VocabError> {
        let mut vocab = Self {
            bytes: Vec::new(),
            starts: vec![0],
            short_ranks: FastMap::default(),
            long_ranks: FastMap::default(),
        };
        for (rank, token) in (0..).zip(tokens) {
            if token.is_empty() {
                return Err(VocabError::EmptyToken(rank));
            }
            let doubled = match short_key(token, 0, token.len()) {
                Some(key) => vocab.short_ranks.insert(key, rank),
                None => vocab.long_ranks.insert(token.into(), rank),
            };
            if doubled.is_some() {
                return Err(VocabError::DoubledToken(token.into()));
            }
            vocab.bytes.extend(token);
            vocab.starts.push(vocab.bytes.len());
        }
        let missing: Vec<u8> = (0..=255).filter(|&byte| vocab.rank(&[byte]).is_none()).collect();
        match missing.is_empty() {
            true => Ok(vocab),
            false => Err(VocabError::MissingBytes(missing)),
        }
    }

    /// Number of tokens.
    #[allow(clippy::len_without_is_empty)] // it holds the 256 bytes at least
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// The token of a rank below [`Vocab::len`].
    pub fn token(&self, rank: u32) -> &[u8] {
        &self.bytes[self.starts[rank as usize]..self.starts[rank as usize + 1]]
    }

    /// The rank of a token, if it is one.
    pub fn rank(&self, token: &[u8]) -> Option<u32> {
        match short_key(token, 0, token.len()) {
            Some(key) => self.short_rank(key),
            None => self.long_ranks.get(token).copied(),
        }
    }

    /// The same by the token's short key.
    pub(crate) fn short_rank(&self, key: u128) -> Option<u32> {
        self.short_ranks.get(&key).copied()
    }

    /// The bytes of all `ids`, or the first id that is none.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, u32> {
        let mut bytes = Vec::new();
        for &id in ids {
            if id as usize >= self.len() {
                return Err(id);
            }
            bytes.extend(self.token(id));
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes() -> Vec<(Vec<u8>, u32)> {
        (0..=255).map(|byte| (vec![byte], byte as u32)).collect()
    }

    fn error(change: impl Fn(&mut Vec<(Vec<u8>, u32)>)) -> String {
        let mut ranks = bytes();
        change(&mut ranks);
        Vocab::from_ranks(&ranks).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn errors_name_what_is_wrong() {
        let doubled = error(|ranks| ranks[9].1 = 7);
        assert_eq!(doubled, "rank 7 belongs to more than one token");
        let doubled = error(|ranks| ranks[9].0 = vec![0]);
        assert_eq!(doubled, r#"token b"\x00" has more than one rank"#);
        let missing = error(|ranks| (ranks[9].1, ranks[11].1) = (256, 300));
        assert!(missing.ends_with("missing: 9, 11"), "{missing}");
        let missing = error(|ranks| ranks[9].0 = b"ab".to_vec());
        assert!(missing.ends_with("missing: 9"), "{missing}");
        let missing = error(|ranks| ranks.truncate(3));
        assert!(missing.ends_with("missing: 3, 4, 5, 6, 7, 8, 9, 10 and 245 more"), "{missing}");
        let empty = error(|ranks| ranks[9].0.clear());
        assert_eq!(empty, "the token of rank 9 has no bytes");
    }

    #[test]
    fn merges_and_decoding() {
        let vocab = Vocab::from_merges(&[(104, 105), (256, 33)]).unwrap();
        assert_eq!(vocab.len(), 258);
        assert_eq!(vocab.token(257), b"hi!");
        assert_eq!(vocab.rank(b"hi"), Some(256));
        assert_eq!(vocab.rank(b"hi?"), None);
        assert_eq!(vocab.decode(&[257, 256, 0]), Ok(b"hi!hi\0".to_vec()));
        assert_eq!(vocab.decode(&[0, 258]), Err(258));
    }
}
