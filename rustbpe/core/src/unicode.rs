//! The four classes of characters that the split patterns tell apart.

use std::sync::LazyLock;

use crate::unicode_tables::{LETTERS, NUMBERS, SPACES};

/// What a character is to `\p{L}`, `\p{N}` and `\s`; no character is two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    Other,
    Letter,
    Number,
    Space,
}

/// The class of every code point below its length; all others are `Other`.
pub type Classes = [Class];

/// The table, built once: 200 KB, because the last letter is U+323AF.
pub fn classes() -> &'static Classes {
    static CLASSES: LazyLock<Vec<Class>> = LazyLock::new(|| {
        let tables: [(&[(u32, u32)], Class); 3] =
            [(&LETTERS, Class::Letter), (&NUMBERS, Class::Number), (&SPACES, Class::Space)];
        let last = tables.iter().flat_map(|(ranges, _)| ranges.iter());
        let last = last.map(|&(_, last)| last).max().unwrap_or(0);
        let mut classes = vec![Class::Other; last as usize + 1];
        for (ranges, class) in tables {
            for &(first, last) in ranges {
                classes[first as usize..=last as usize].fill(class);
            }
        }
        classes
    });
    &CLASSES
}
