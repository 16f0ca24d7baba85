//! Splitting text into the pieces that merges never cross.

use std::convert::Infallible;

use crate::unicode::{Class, Classes, classes};

/// Cuts text into pieces.
pub trait Split: Sync {
    /// Why a text could not be split.
    type Error: Send;

    /// Calls `piece(start, end)` for each piece of `text`, in order, with byte offsets.
    fn split(&self, text: &str, piece: impl FnMut(usize, usize)) -> Result<(), Self::Error>;
}

/// GPT-4's pattern, with numbers cut after `max_digits` characters:
///
/// ```text
/// '(?i:[sdmt]|ll|ve|re)
/// [^\r\n\p{L}\p{N}]?+\p{L}+
/// \p{N}{1,max_digits}
///  ?[^\s\p{L}\p{N}]++[\r\n]*
/// \s*[\r\n]
/// \s+(?!\S)
/// \s+
/// ```
#[derive(Clone)]
pub struct Gpt4Split {
    max_digits: usize,
    classes: &'static Classes,
}

impl Gpt4Split {
    /// Numbers are cut after `max_digits` characters, at least one.
    pub fn new(max_digits: usize) -> Self {
        assert!(max_digits > 0);
        let classes = classes();
        Self { max_digits, classes }
    }

    /// The splitter of a pattern written as nanochat or as tiktoken writes it, if it is one.
    pub fn from_pattern(pattern: &str) -> Option<Self> {
        let max_digits = (1..=9).find(|n| {
            let rest = format!(r"\p{{N}}{{1,{n}}}| ?[^\s\p{{L}}\p{{N}}]");
            [
                format!(
                    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|{rest}++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
                ),
                format!(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{rest}+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
            ]
            .iter()
            .any(|known| known == pattern)
        })?;
        Some(Self::new(max_digits))
    }

    /// Class and UTF-8 length of the character at `at`, which is a boundary before the end.
    #[inline(always)]
    fn class_at(&self, text: &str, at: usize) -> (Class, usize) {
        let byte = text.as_bytes()[at];
        if byte < 0x80 {
            return (self.classes[byte as usize], 1);
        }
        self.wide_class_at(text, at)
    }

    #[inline(never)]
    fn wide_class_at(&self, text: &str, at: usize) -> (Class, usize) {
        let char = text[at..].chars().next().expect("`at` is before the end");
        let class = self.classes.get(char as usize).copied();
        (class.unwrap_or(Class::Other), char.len_utf8())
    }

    /// End of the run of letters that begins at `at`.
    #[inline(always)]
    fn letters(&self, text: &str, mut at: usize) -> usize {
        while let Some(eight) = text.as_bytes().get(at..at + 8) {
            let eight = u64::from_le_bytes(eight.try_into().expect("8 bytes"));
            let others = !ascii_letters(eight) & HIGH_BITS;
            at += others.trailing_zeros() as usize / 8;
            if others == 0 {
                continue;
            }
            if text.as_bytes()[at] < 0x80 {
                return at;
            }
            let (class, len) = self.wide_class_at(text, at);
            if class != Class::Letter {
                return at;
            }
            at += len;
        }
        self.run(text, at, Class::Letter)
    }

    /// End of the run of `class` that begins at `at`.
    #[inline(always)]
    fn run(&self, text: &str, mut at: usize, class: Class) -> usize {
        while at < text.len() {
            let (found, len) = self.class_at(text, at);
            if found != class {
                break;
            }
            at += len;
        }
        at
    }

    /// End of the punctuation that begins at `at`, with the line breaks after it.
    #[inline(always)]
    fn punctuation(&self, text: &str, at: usize) -> usize {
        let mut end = self.run(text, at, Class::Other);
        while end < text.len() && is_line_break(text.as_bytes()[end]) {
            end += 1;
        }
        end
    }

    fn number(&self, text: &str, mut at: usize) -> usize {
        for _ in 0..self.max_digits {
            if at == text.len() {
                break;
            }
            let (class, len) = self.class_at(text, at);
            if class != Class::Number {
                break;
            }
            at += len;
        }
        at
    }

    /// White space up to its last line break; without one, all of it at the end of the text; else
    /// all but the last character, which may belong to the word that follows, unless it is the only one.
    fn white_space(&self, text: &str, start: usize) -> usize {
        let (mut end, mut last, mut line_end) = (start, start, None);
        while end < text.len() {
            let (class, len) = self.class_at(text, end);
            if class != Class::Space {
                break;
            }
            last = end;
            end += len;
            if is_line_break(text.as_bytes()[last]) {
                line_end = Some(end);
            }
        }
        match line_end {
            Some(line_end) => line_end,
            None if end == text.len() || last == start => end,
            None => last,
        }
    }

    /// End of the piece that begins at `start`, a boundary before the end of the text.
    #[inline(always)]
    fn piece_end(&self, text: &str, start: usize) -> usize {
        let (class, len) = self.class_at(text, start);
        let next = start + len;
        match class {
            Class::Letter => return self.letters(text, next),
            Class::Number => return self.number(text, start),
            _ => (),
        }
        let first = text.as_bytes()[start];
        if first == b'\''
            && let Some(len) = contraction(&text.as_bytes()[next..])
        {
            return next + len;
        }
        let next_class = match next < text.len() {
            true => self.class_at(text, next).0,
            false => Class::Space,
        };
        if next_class == Class::Letter && !is_line_break(first) {
            return self.letters(text, next);
        }
        match class {
            Class::Other => self.punctuation(text, next),
            _ if first == b' ' && next_class == Class::Other => self.punctuation(text, next),
            _ => self.white_space(text, start),
        }
    }
}

impl Split for Gpt4Split {
    type Error = Infallible;

    #[inline(always)]
    fn split(&self, text: &str, mut piece: impl FnMut(usize, usize)) -> Result<(), Infallible> {
        let mut start = 0;
        while start < text.len() {
            let end = self.piece_end(text, start);
            piece(start, end);
            start = end;
        }
        Ok(())
    }
}

const HIGH_BITS: u64 = 0x8080_8080_8080_8080;

/// The high bit of each of eight bytes that is an ASCII letter.
#[inline(always)]
fn ascii_letters(eight: u64) -> u64 {
    const EACH: u64 = 0x0101_0101_0101_0101;
    let lower = (eight | (0x20 * EACH)) & !HIGH_BITS;
    let from_a = lower + (0x80 - b'a' as u64) * EACH;
    let past_z = lower + (0x7F - b'z' as u64) * EACH;
    from_a & !past_z & !eight & HIGH_BITS
}

fn is_line_break(byte: u8) -> bool {
    byte == b'\r' || byte == b'\n'
}

/// Length of the English ending after an apostrophe: `(?i:[sdmt]|ll|ve|re)`.
fn contraction(rest: &[u8]) -> Option<usize> {
    const LONG_S: [u8; 2] = [0xC5, 0xBF]; // U+017F, an `s` to (?i)
    let lower = |at: usize| rest.get(at).map(u8::to_ascii_lowercase);
    match (lower(0)?, lower(1)) {
        (b's' | b'd' | b'm' | b't', _) => Some(1),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(2),
        _ if rest.starts_with(&LONG_S) => Some(LONG_S.len()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str) -> Vec<&str> {
        let mut pieces = Vec::new();
        let Ok(()) = Gpt4Split::new(2).split(text, |start, end| pieces.push(&text[start..end]));
        pieces
    }

    #[test]
    fn every_branch() {
        for (text, expected) in [
            ("", &[] as &[&str]),
            ("Hello world", &["Hello", " world"]),
            ("it's IT'S it\u{2019}s", &["it", "'s", " IT", "'S", " it", "\u{2019}s"]),
            ("we'LL they'vest'x", &["we", "'LL", " they", "'ve", "st", "'x"]),
            ("a'\u{17f}t'l'", &["a", "'\u{17f}", "t", "'l", "'"]),
            ("12345 6", &["12", "34", "5", " ", "6"]),
            ("f(x) == !!ok!\r\n\nz", &["f", "(x", ")", " ==", " !!", "ok", "!\r\n\n", "z"]),
            ("a  \t b", &["a", "  \t", " b"]),
            ("a \n  \n  b", &["a", " \n  \n", " ", " b"]),
            ("a\n b", &["a", "\n", " b"]),
            ("end  ", &["end", "  "]),
            ("\u{3000}\u{4e2d}\u{85}\u{85}1", &["\u{3000}\u{4e2d}", "\u{85}", "\u{85}", "1"]),
            ("e\u{301}a \u{301}\u{301}b", &["e", "\u{301}a", " \u{301}\u{301}", "b"]),
            ("\u{1c5}\u{660}\u{661}\u{662}", &["\u{1c5}", "\u{660}\u{661}", "\u{662}"]),
        ] {
            assert_eq!(pieces(text), expected, "{text:?}");
        }
    }

    #[test]
    fn eight_bytes_at_once() {
        for byte in 0..=255 {
            for at in 0..8 {
                let mut eight = *b"a{Z@[`zA";
                eight[at] = byte;
                let expected = eight.map(|byte| 0x80 * u8::from(byte.is_ascii_alphabetic()));
                let found = ascii_letters(u64::from_le_bytes(eight));
                assert_eq!(found, u64::from_le_bytes(expected));
            }
        }
    }

    #[test]
    fn known_patterns() {
        let ours = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
        assert_eq!(Gpt4Split::from_pattern(ours).map(|s| s.max_digits), Some(2));
        let cl100k = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        assert_eq!(Gpt4Split::from_pattern(cl100k).map(|s| s.max_digits), Some(3));
        assert!(Gpt4Split::from_pattern(r"\p{L}+").is_none());
        assert!(Gpt4Split::from_pattern("").is_none());
    }
}
