//! The splitter of a pattern: hand-written where there is one, else a regular expression.

use fancy_regex::Regex;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use rustbpe_core::{Gpt4Split, Split};

/// A compiled split pattern. Text that no match covers belongs to no piece, as in tiktoken.
pub enum Pattern {
    Gpt4(Gpt4Split),
    Regex(Box<Regex>),
}

impl Pattern {
    /// Raises ValueError for a pattern that is no regular expression.
    pub fn new(pattern: &str) -> PyResult<Self> {
        if let Some(splitter) = Gpt4Split::from_pattern(pattern) {
            return Ok(Self::Gpt4(splitter));
        }
        let regex = Regex::new(pattern);
        let regex = regex
            .map_err(|error| PyValueError::new_err(format!("Invalid regex pattern: {error}")))?;
        Ok(Self::Regex(Box::new(regex)))
    }
}

/// A backtracking regular expression gives up where it would take too long.
pub fn split_error(error: fancy_regex::Error) -> PyErr {
    PyRuntimeError::new_err(format!("the split pattern failed on this text: {error}"))
}

impl Split for Pattern {
    type Error = fancy_regex::Error;

    #[inline(always)]
    fn split(
        &self,
        text: &str,
        mut piece: impl FnMut(usize, usize),
    ) -> Result<(), fancy_regex::Error> {
        match self {
            Self::Gpt4(splitter) => {
                let Ok(()) = splitter.split(text, piece);
            }
            Self::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let found = found?;
                    if found.start() < found.end() {
                        piece(found.start(), found.end());
                    }
                }
            }
        }
        Ok(())
    }
}
