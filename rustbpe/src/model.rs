//! A vocabulary and a split pattern, and encoding with them into Python's objects.

use std::sync::{Arc, OnceLock};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyByteArray, PyInt, PyList, PyString};
use rustbpe_core::{Encoded, Encoder, Vocab};

use crate::pattern::{Pattern, split_error};
use crate::texts::{BATCH_BYTES, utf8, utf8_all};

pub struct Model {
    /// Empty as long as there is nothing to encode with.
    pub pattern: String,
    pub splitter: Pattern,
    pub vocab: Arc<Vocab>,
    /// Made at the first use: a trained vocabulary is often only stored.
    encoder: OnceLock<Encoder>,
    /// The ids as Python's ints: sharing them is faster than creating each one again.
    ints: PyOnceLock<Vec<Py<PyInt>>>,
}

impl Model {
    pub fn new(pattern: String, splitter: Pattern, vocab: Vocab) -> Self {
        let (vocab, encoder, ints) = (Arc::new(vocab), OnceLock::new(), PyOnceLock::new());
        Self { pattern, splitter, vocab, encoder, ints }
    }

    fn encoder(&self) -> &Encoder {
        self.encoder.get_or_init(|| Encoder::new(Arc::clone(&self.vocab)))
    }

    pub fn encode(&self, text: &Bound<'_, PyString>) -> PyResult<Vec<u32>> {
        let py = text.py();
        let text = utf8(text, None)?;
        py.detach(|| self.encoder().encode(&self.splitter, text)).map_err(split_error)
    }

    /// Encodes with the GIL released; `block` gets the results in order.
    pub fn encode_blocks(
        &self,
        py: Python<'_>,
        texts: &[Bound<'_, PyString>],
        num_threads: usize,
        mut block: impl FnMut(Encoded) -> PyResult<()>,
    ) -> PyResult<()> {
        let texts = utf8_all(texts, 0)?;
        let mut rest = &texts[..];
        while !rest.is_empty() {
            let mut bytes = 0;
            let is_full = |text: &&str| {
                bytes += text.len();
                bytes >= BATCH_BYTES
            };
            let len = rest.iter().position(is_full).map_or(rest.len(), |last| last + 1);
            let batch;
            (batch, rest) = rest.split_at(len);
            let encoded =
                py.detach(|| self.encoder().encode_batch(&self.splitter, batch, num_threads));
            encoded.map_err(split_error)?.into_iter().try_for_each(&mut block)?;
            py.check_signals()?;
        }
        Ok(())
    }

    /// A list of ids that are in the vocabulary.
    pub fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        let ints = self.ints.get_or_init(py, || {
            let ids = 0..self.vocab.len() as u32;
            ids.map(|id| PyInt::new(py, id).unbind()).collect()
        });
        PyList::new(py, ids.iter().map(|&id| &ints[id as usize]))
    }
}

/// A bytearray of `len` items.
pub fn byte_array<'py, const SIZE: usize>(
    py: Python<'py>,
    len: usize,
    items: impl Iterator<Item = [u8; SIZE]>,
) -> PyResult<Bound<'py, PyByteArray>> {
    PyByteArray::new_with(py, len * SIZE, |bytes| {
        for (place, item) in bytes.chunks_exact_mut(SIZE).zip(items) {
            place.copy_from_slice(&item);
        }
        Ok(())
    })
}
