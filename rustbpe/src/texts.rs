//! Python's texts: as UTF-8, and counted in batches from an iterator.

use std::panic::resume_unwind;
use std::thread;

use pyo3::exceptions::PyUnicodeEncodeError;
use pyo3::prelude::*;
use pyo3::types::{PyIterator, PyString};
use rustbpe_core::WordCounts;

use crate::pattern::{Pattern, split_error};
use crate::watch::Watch;

/// Text read from an iterator, or encoded, before signals are looked at: some tenths of a second.
pub const BATCH_BYTES: usize = 1 << 24;

/// The UTF-8 of a str, without a copy if it is ASCII.
///
/// `number` is the text's place among others, for the error of lone surrogates.
pub fn utf8<'a>(text: &'a Bound<'_, PyString>, number: Option<usize>) -> PyResult<&'a str> {
    text.to_str().map_err(|error| {
        let value = error.value(text.py());
        let position = |name| value.getattr(name)?.extract::<isize>();
        let (Ok(start), Ok(end)) = (position("start"), position("end")) else {
            return error;
        };
        let place = number.map_or_else(String::new, |number| format!(" (text {number} of these)"));
        let reason = format!("lone surrogates are no text, replace them first{place}");
        PyUnicodeEncodeError::new_err(("utf-8", text.clone().unbind(), start, end, reason))
    })
}

/// The UTF-8 of texts, the first of which is number `first`.
pub fn utf8_all<'a>(texts: &'a [Bound<'_, PyString>], first: usize) -> PyResult<Vec<&'a str>> {
    let numbered = (first..).zip(texts);
    numbered.map(|(number, text)| utf8(text, Some(number))).collect()
}

/// Counts the pieces of all texts of an iterator: one batch, of up to `buffer_size` texts, without
/// the GIL, while the next one is read with it.
pub fn count(
    iterator: &mut Bound<'_, PyIterator>,
    buffer_size: usize,
    splitter: &Pattern,
    words: &mut WordCounts,
    watch: &mut Watch,
) -> PyResult<()> {
    let py = iterator.py();
    let (mut num_texts, mut num_bytes) = (0, 0);
    let mut batch = next_batch(iterator, buffer_size)?;
    while !batch.is_empty() {
        let texts = utf8_all(&batch, num_texts)?;
        num_texts += texts.len();
        num_bytes += texts.iter().map(|text| text.len()).sum::<usize>();
        let next = thread::scope(|scope| {
            let counting = scope.spawn(|| words.add(splitter, &texts));
            let next = next_batch(iterator, buffer_size);
            // A str keeps its UTF-8: no thread waits for it when its turn comes.
            let next = next.and_then(|next| utf8_all(&next, num_texts).map(drop).map(|()| next));
            let counted = py.detach(|| counting.join());
            counted.unwrap_or_else(|panic| resume_unwind(panic)).map_err(split_error)?;
            next
        })?;
        watch.tick("count", num_bytes, None)?;
        batch = next;
    }
    watch.now("count", num_bytes, None)
}

/// Up to `buffer_size` texts or about BATCH_BYTES; none at the end.
fn next_batch<'py>(
    iterator: &mut Bound<'py, PyIterator>,
    buffer_size: usize,
) -> PyResult<Vec<Bound<'py, PyString>>> {
    let mut batch = Vec::new();
    let mut num_chars = 0;
    while batch.len() < buffer_size && num_chars < BATCH_BYTES {
        let Some(text) = iterator.next() else {
            break;
        };
        let text = text?.cast_into::<PyString>()?;
        num_chars += text.len()?;
        batch.push(text);
    }
    Ok(batch)
}
