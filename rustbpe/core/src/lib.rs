//! Byte-pair encoding: split text into pieces, count the pieces, learn merges, encode.
//!
//! The pieces of a text come from a [`Split`]; [`Gpt4Split`] is the hand-written one for the
//! pattern of GPT-4. [`WordCounts`] counts the distinct pieces of a stream, [`train`] turns the
//! counts into merges, an [`Encoder`] turns text into token ids. Nothing here depends on the number
//! of threads, on the order of texts, or on how a stream is cut into batches.

mod count;
mod encode;
mod hash;
mod parallel;
mod quota;
mod split;
mod train;
mod unicode;
#[rustfmt::skip] // it is generated
mod unicode_tables;
mod vocab;

pub use count::WordCounts;
pub use encode::{Encoded, Encoder};
pub use quota::cpu_quota;
pub use split::{Gpt4Split, Split};
pub use train::{Merge, TieBreak, TrainError, train};
pub use vocab::{Vocab, VocabError};
