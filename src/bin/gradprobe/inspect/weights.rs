//! The weights of the inspected gradients: only their norms are used.

use crate::{
    device::Open,
    files::{Entry, Failure, Lent, OtherTypes, TensorFile},
};
use gradprobe::{Config, HostTensor, Tensor};
use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

/// Open files with a weight for every gradient. Other tensors in them are ignored, of any dtype.
pub struct Weights {
    tensors: TensorFile,
}

impl Weights {
    /// Opens a file, and fails unless it has all the weights of the `gradients`, which lie in `of`.
    pub fn open(path: &Path, of: &Path, gradients: &[Entry]) -> Result<Self, Failure> {
        let names: HashSet<&str> = gradients.iter().map(|gradient| gradient.name.as_str()).collect();
        let tensors = TensorFile::open(path, |name| names.contains(name), OtherTypes::Refused)?;
        // Both are in the same order, and every weight has a gradient.
        let mut weights = tensors.entries.iter().peekable();
        for gradient in gradients {
            let reason = match weights.next_if(|weight| weight.name == gradient.name) {
                None => format!("is missing here, but its gradient is in {}", of.display()),
                Some(weight) if weight.len != gradient.len => {
                    format!("{} elements here, {} of its gradient in {}", weight.len, gradient.len, of.display())
                }
                Some(_) => continue,
            };
            return Err(Failure::tensor(path, &gradient.name, reason));
        }
        Ok(Self { tensors })
    }

    /// The files of the weights.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> {
        self.tensors.files().map(Path::to_owned)
    }

    /// Reads the weights and gives the L2 norm of each.
    pub fn norms(self, open: Open<'_>, progress: impl FnMut(&Path)) -> Result<Vec<f64>, Failure> {
        let mut probe = open(self.tensors.plan()?, Config::default())?;
        let elements = self.tensors.lend(progress)?;
        let views: Vec<HostTensor> = elements.iter().map(Lent::view).collect();
        let views: Vec<&dyn Tensor> = views.iter().map(|view| view as _).collect();
        let report = probe.measure(&views).and_then(|()| probe.wait());
        let report = report.map_err(|error| Failure::file(&self.tensors.path, error))?;
        Ok(report.records().iter().map(|record| record.l2_norm()).collect())
    }
}
