//! The properties of `checks` on texts of a seeded generator, and the Unicode tables.

mod checks;
#[path = "../examples/unicode_tables.rs"]
mod unicode_tables;

use fancy_regex::Regex;

use checks::{check_encode_foreign_tokens, check_split, check_train_and_encode};
use checks::{first_pattern, pattern};

/// What tells the branches of the patterns apart, beside any character at all.
const SNIPPETS: [&str; 56] = [
    "a",
    "b",
    "ab",
    "aa",
    "aaa",
    "the",
    "The",
    "s",
    "ll",
    "VE",
    "re",
    "T",
    "'",
    "'s",
    "'LL",
    "\u{2019}",
    "0",
    "12",
    "345",
    "\u{663}",
    "\u{2167}",
    "\u{bd}",
    " ",
    " ",
    " ",
    "  ",
    "\t",
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    "\u{b}",
    "\u{85}",
    "\u{a0}",
    "\u{3000}",
    "\u{2028}",
    "\u{180e}",
    "\u{200b}",
    "\u{feff}",
    "\0",
    "\u{17f}",
    "\u{1c5}",
    "\u{212a}",
    "\u{301}",
    "e\u{301}",
    "\u{df}",
    "\u{4e2d}\u{6587}",
    "\u{e01}\u{e33}",
    "\u{5e9}\u{5dc}",
    "\u{645}\u{631}",
    "\u{1f469}\u{200d}\u{1f467}",
    "\u{1f3fd}",
    "!",
    "...",
    "_",
    "$%",
];

/// Numbers that look random (splitmix64, Steele et al. 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }

    fn text(&mut self) -> String {
        let len = 1 + self.below(40);
        let kinds = 2 + self.below(SNIPPETS.len());
        let first = self.below(SNIPPETS.len());
        let mut text = String::new();
        while text.len() < len {
            match self.below(12) {
                0 => text.extend(char::from_u32(self.below(0x11_0000) as u32)),
                1 => text.extend(char::from_u32(self.below(0x3000) as u32)),
                _ => text += SNIPPETS[(first + self.below(kinds)) % SNIPPETS.len()],
            }
        }
        text
    }
}

#[test]
fn splitting_is_the_regular_expression() {
    let mut random = Random(1);
    for max_digits in 1..=3 {
        for pattern in [pattern(max_digits), first_pattern(max_digits)] {
            let regex = Regex::new(&pattern).unwrap();
            for _ in 0..4_000 {
                check_split(&pattern, &regex, &random.text());
            }
        }
    }
}

#[test]
fn every_character_is_split_as_the_regular_expression_does() {
    let pattern = pattern(2);
    let regex = Regex::new(&pattern).unwrap();
    let all: Vec<char> = (0..=0x10_FFFF).filter_map(char::from_u32).collect();
    for some in all.chunks(4096) {
        let text: String = some.iter().flat_map(|&char| [' ', char, 'a', char, '1']).collect();
        check_split(&pattern, &regex, &text);
    }
}

#[test]
fn training_and_encoding_are_the_plain_algorithms() {
    let mut random = Random(2);
    for _ in 0..400 {
        check_train_and_encode(&random.text());
    }
}

#[test]
fn encoding_with_any_tokens_is_the_plain_algorithm() {
    let mut random = Random(3);
    for _ in 0..400 {
        let text = random.text() + &random.text();
        check_encode_foreign_tokens(&text);
    }
}

#[test]
fn unicode_tables_are_those_of_the_regex_crate() {
    let committed = include_str!("../core/src/unicode_tables.rs");
    assert!(committed == unicode_tables::unicode_tables(), "generate them again");
}
