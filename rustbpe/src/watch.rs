//! Long work looks after Python now and then.

use std::time::{Duration, Instant};

use pyo3::prelude::*;

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(100);

/// Calls a progress function and lets signals (Ctrl-C) raise.
pub struct Watch {
    progress: Option<Py<PyAny>>,
    last: Instant,
}

impl Watch {
    pub fn new(progress: Option<Py<PyAny>>) -> Self {
        let last = Instant::now();
        Self { progress, last }
    }

    /// `now`, unless the last look was just before.
    pub fn tick(&mut self, stage: &str, done: usize, total: Option<usize>) -> PyResult<()> {
        match self.last.elapsed() < INTERVAL {
            true => Ok(()),
            false => self.now(stage, done, total),
        }
    }

    /// Reports that `done` of `total` is done.
    pub fn now(&mut self, stage: &str, done: usize, total: Option<usize>) -> PyResult<()> {
        self.last = Instant::now();
        Python::attach(|py| {
            if let Some(progress) = &self.progress {
                progress.call1(py, (stage, done, total))?;
            }
            py.check_signals()
        })
    }
}
