//! Training and encoding against the plain algorithms.
#![no_main]

#[path = "../../tests/checks/mod.rs"]
#[allow(dead_code)] // each target uses some of the checks
mod checks;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    checks::check_train_and_encode(text);
    checks::check_encode_foreign_tokens(text);
});
