//! The hand-written splitter against the regular expression.
#![no_main]

#[path = "../../tests/checks/mod.rs"]
#[allow(dead_code)] // each target uses some of the checks
mod checks;

use std::sync::LazyLock;

use fancy_regex::Regex;
use libfuzzer_sys::fuzz_target;

static PATTERN: LazyLock<String> = LazyLock::new(|| checks::pattern(2));
static REGEX: LazyLock<Regex> = LazyLock::new(|| Regex::new(&PATTERN).unwrap());

fuzz_target!(|text: &str| checks::check_split(&PATTERN, &REGEX, text));
