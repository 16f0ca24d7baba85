//! The Python module `rustbpe`: types, errors and the release of the GIL around `rustbpe_core`.

mod model;
mod pattern;
mod texts;
mod watch;

use std::num::NonZero;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use pyo3::exceptions::{PyUnicodeDecodeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyString, PyTuple};
use rustbpe_core::{Split, TieBreak, TrainError, Vocab, VocabError, WordCounts, cpu_quota, train};

use crate::model::{Model, byte_array};
use crate::pattern::{Pattern, split_error};
use crate::texts::{count, utf8};
use crate::watch::Watch;

/// GPT-4's pattern.
const DEFAULT_PATTERN: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const NUM_BYTES: u32 = 256;

/// A byte-level BPE tokenizer: train it, or load ranks, then encode and decode.
#[pyclass(frozen, module = "rustbpe")]
struct Tokenizer {
    model: Mutex<Arc<Model>>,
}

#[pymethods]
impl Tokenizer {
    /// A tokenizer of the 256 bytes, to be trained.
    #[new]
    fn new() -> PyResult<Self> {
        let vocab = Vocab::from_merges(&[]).map_err(vocab_error)?;
        Ok(Self::of(String::new(), Pattern::new("")?, vocab))
    }

    /// A tokenizer of merge ranks {token: rank}, as tiktoken takes them, and a split pattern.
    ///
    /// Raises  ValueError naming a doubled or missing rank, or missing bytes; or for a bad pattern.
    #[staticmethod]
    fn from_ranks(py: Python<'_>, ranks: &Bound<'_, PyAny>, pattern: String) -> PyResult<Self> {
        let splitter = compile(&pattern)?;
        let items = match ranks.hasattr("items")? {
            true => ranks.call_method0("items")?,
            false => ranks.clone(),
        };
        let pairs = items
            .try_iter()?
            .map(|pair| pair?.extract())
            .collect::<PyResult<Vec<(Vec<u8>, u32)>>>()?;
        py.detach(|| {
            let vocab = Vocab::from_ranks(&pairs).map_err(vocab_error)?;
            Ok(Self::of(pattern, splitter, vocab))
        })
    }

    /// Learn a vocabulary from an iterator of texts.
    ///
    /// iterator     yields str; read in batches of up to buffer_size texts or 16 MiB, while the
    ///              batch before is counted
    /// vocab_size   tokens wanted, at least 256; fewer are learnt if the text yields no more
    /// pattern      split pattern, GPT-4's by default
    /// progress     called some times a second as progress(stage, done, total): ("count", bytes,
    ///              None), then ("merge", merges, merges wanted); an exception ends the training
    /// num_threads  threads that count, default_num_threads() by default; one of them merges
    /// tie_break    "rustbpe" or "huggingface": which of equally frequent pairs comes first
    ///
    /// The result depends on the texts, pattern and tie_break only. A training that fails leaves
    /// the tokenizer as it was.
    /// Raises  ValueError for a bad argument, or for text with lone surrogates.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, *, progress=None,
                        num_threads=None, tie_break="rustbpe"))]
    #[allow(clippy::too_many_arguments)] // they are Python's keywords
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: u32,
        buffer_size: usize,
        pattern: Option<String>,
        progress: Option<Py<PyAny>>,
        num_threads: Option<usize>,
        tie_break: &str,
    ) -> PyResult<()> {
        let pattern = pattern.unwrap_or_else(|| DEFAULT_PATTERN.to_owned());
        let splitter = compile(&pattern)?;
        let tie_break = match tie_break {
            "rustbpe" => TieBreak::RustBpe,
            "huggingface" => TieBreak::HuggingFace,
            _ => {
                let message =
                    format!("tie_break {tie_break:?} is not \"rustbpe\" or \"huggingface\"");
                return Err(PyValueError::new_err(message));
            }
        };
        if vocab_size < NUM_BYTES {
            let message = format!("vocab_size must be at least {NUM_BYTES}, not {vocab_size}");
            return Err(PyValueError::new_err(message));
        }
        if buffer_size == 0 {
            return Err(PyValueError::new_err("buffer_size must be at least 1, not 0"));
        }
        let mut watch = Watch::new(progress);
        let mut words = WordCounts::new(threads(py, num_threads)?);
        count(&mut iterator.try_iter()?, buffer_size, &splitter, &mut words, &mut watch)?;
        let num_merges = (vocab_size - NUM_BYTES) as usize;
        let model = py.detach(|| {
            let merges = train(words, num_merges, tie_break, |done| {
                watch.tick("merge", done, Some(num_merges))
            });
            let merges = merges.map_err(|error| match error {
                TrainError::TooManyWords => PyValueError::new_err(
                    "the distinct pieces of the text exceed 4 GiB; train on less text",
                ),
                TrainError::Stopped(error) => error,
            })?;
            watch.now("merge", merges.len(), Some(num_merges))?;
            let vocab = Vocab::from_merges(&merges).map_err(vocab_error)?;
            Ok::<_, PyErr>(Model::new(pattern, splitter, vocab))
        })?;
        *self.model.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(model);
        Ok(())
    }

    /// The split pattern; empty before training.
    fn get_pattern(&self) -> String {
        self.model().pattern.clone()
    }

    /// (token, rank) of every token, by rank.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        let model = self.model();
        let vocab = &model.vocab;
        (0..vocab.len() as u32).map(|rank| (PyBytes::new(py, vocab.token(rank)), rank)).collect()
    }

    /// Number of tokens.
    #[getter]
    fn vocab_size(&self) -> u32 {
        self.model().vocab.len() as u32
    }

    /// Token ids of a text.
    ///
    /// Raises  ValueError before training, or for lone surrogates.
    fn encode<'py>(
        &self,
        py: Python<'py>,
        text: &Bound<'py, PyString>,
    ) -> PyResult<Bound<'py, PyList>> {
        let model = self.ready()?;
        model.list(py, &model.encode(text)?)
    }

    /// Token ids of each text of a sequence, with default_num_threads() threads by default.
    ///
    /// Raises  ValueError as encode.
    #[pyo3(signature = (texts, num_threads=None))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        num_threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyList>> {
        let model = self.ready()?;
        let lists = PyList::empty(py);
        model.encode_blocks(py, &texts, threads(py, num_threads)?, |block| {
            let mut start = 0;
            for &end in &block.ends {
                lists.append(model.list(py, &block.tokens[start..end])?)?;
                start = end;
            }
            Ok(())
        })?;
        Ok(lists)
    }

    /// encode_batch with default_num_threads() threads.
    fn batch_encode<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
    ) -> PyResult<Bound<'py, PyList>> {
        self.encode_batch(py, texts, None)
    }

    /// Token ids of all texts in one array, and where each begins: (tokens, offsets).
    ///
    /// tokens   numpy (total,), uint16 if every id fits, else uint32
    /// offsets  numpy (len(texts) + 1,) int64; text i is tokens[offsets[i]:offsets[i + 1]]
    ///
    /// Raises  ValueError as encode; ImportError without numpy.
    #[pyo3(signature = (texts, num_threads=None))]
    fn encode_to_numpy<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        num_threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let from_buffer = py.import("numpy")?.getattr("frombuffer")?;
        let model = self.ready()?;
        let mut blocks = Vec::new();
        model.encode_blocks(py, &texts, threads(py, num_threads)?, |block| {
            blocks.push(block);
            Ok(())
        })?;
        let tokens = || blocks.iter().flat_map(|block| &block.tokens);
        let num_tokens: usize = blocks.iter().map(|block| block.tokens.len()).sum();
        let small = model.vocab.len() <= 1 << 16;
        let token_bytes = match small {
            true => byte_array(py, num_tokens, tokens().map(|&id| (id as u16).to_ne_bytes())),
            false => byte_array(py, num_tokens, tokens().map(|&id| id.to_ne_bytes())),
        }?;
        let mut before = 0;
        let ends = blocks.iter().flat_map(|block| {
            let base = before;
            before += block.tokens.len();
            block.ends.iter().map(move |end| (base + end) as i64)
        });
        let offsets = [0].into_iter().chain(ends).map(i64::to_ne_bytes);
        let offset_bytes = byte_array(py, texts.len() + 1, offsets)?;
        let tokens = from_buffer.call1((token_bytes, if small { "uint16" } else { "uint32" }))?;
        let offsets = from_buffer.call1((offset_bytes, "int64"))?;
        PyTuple::new(py, [tokens, offsets])
    }

    /// Text of token ids.
    ///
    /// Raises  ValueError for an unknown id; UnicodeDecodeError, a ValueError, if the bytes are not
    ///         UTF-8: then use decode_bytes.
    fn decode(&self, py: Python<'_>, ids: Vec<u32>) -> PyResult<String> {
        String::from_utf8(self.bytes_of(&ids)?).map_err(|error| {
            let utf8 = error.utf8_error();
            match PyUnicodeDecodeError::new_utf8(py, error.as_bytes(), utf8) {
                Ok(error) => PyErr::from_value(error.into_any()),
                Err(error) => error,
            }
        })
    }

    /// Bytes of token ids. Raises ValueError for an unknown id.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.bytes_of(&ids)?))
    }

    /// The pieces into which the pattern cuts a text; no token crosses their bounds.
    ///
    /// Raises  ValueError as encode.
    fn split<'py>(
        &self,
        py: Python<'py>,
        text: &Bound<'py, PyString>,
    ) -> PyResult<Bound<'py, PyList>> {
        let model = self.ready()?;
        let text = utf8(text, None)?;
        let mut pieces = Vec::new();
        model
            .splitter
            .split(text, |start, end| pieces.push(&text[start..end]))
            .map_err(split_error)?;
        PyList::new(py, pieces)
    }

    fn __repr__(&self) -> String {
        let model = self.model();
        let vocab_size = model.vocab.len();
        format!("Tokenizer(vocab_size={vocab_size}, pattern={:?})", model.pattern)
    }
}

impl Tokenizer {
    fn of(pattern: String, splitter: Pattern, vocab: Vocab) -> Self {
        let model = Model::new(pattern, splitter, vocab);
        Self { model: Mutex::new(Arc::new(model)) }
    }

    fn model(&self) -> Arc<Model> {
        let model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&model)
    }

    /// The model, if there is one to encode with.
    fn ready(&self) -> PyResult<Arc<Model>> {
        let model = self.model();
        if model.pattern.is_empty() {
            return Err(PyValueError::new_err(
                "the tokenizer has no vocabulary yet; call train_from_iterator or from_ranks",
            ));
        }
        Ok(model)
    }

    fn bytes_of(&self, ids: &[u32]) -> PyResult<Vec<u8>> {
        let model = self.model();
        let bytes = model.vocab.decode(ids);
        bytes.map_err(|id| PyValueError::new_err(format!("Unknown token id: {id}")))
    }
}

/// The number of threads asked for, or the default.
fn threads(py: Python<'_>, num_threads: Option<usize>) -> PyResult<usize> {
    match num_threads {
        Some(0) => Err(PyValueError::new_err("num_threads must be at least 1, not 0")),
        Some(num_threads) => Ok(num_threads),
        None => default_num_threads(py),
    }
}

/// The processors that this process may use: its CPU affinity, limited by the quota of its cgroup and
/// of those around it (of a container, say), rounded up.
#[pyfunction]
fn default_num_threads(py: Python<'_>) -> PyResult<usize> {
    let affinity = match py.import("os")?.getattr_opt("sched_getaffinity")? {
        Some(affinity) => affinity.call1((0,))?.len()?,
        None => thread::available_parallelism().map_or(1, NonZero::get), // not on Linux
    };
    Ok(cpu_quota().map_or(affinity, |quota| quota.min(affinity)))
}

/// The pattern's splitter. Raises ValueError for a pattern that is empty or malformed.
fn compile(pattern: &str) -> PyResult<Pattern> {
    match pattern {
        "" => Err(PyValueError::new_err("the split pattern is empty; leave it out for GPT-4's")),
        _ => Pattern::new(pattern),
    }
}

fn vocab_error(error: VocabError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(default_num_threads, module)?)?;
    module.add_class::<Tokenizer>()
}
