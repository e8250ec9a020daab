//! The tensors of a call: checked against the plan, lent by their owners, and put into the device's table.

use super::Core;
use crate::{
    DType, Error, Tensor, TensorMut,
    tensor::{Lent, Place},
};
use std::any::Any;

/// The list of the plan that the tensors must match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Planned {
    Gradients,
    Weights,
    /// The weights that an optimizer moves.
    Updated,
    /// Of the gradients' lengths, with any dtypes.
    Lengths,
}

/// A lent tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Located {
    /// 0 for an absent or empty tensor.
    pub address: u64,
    pub dtype: DType,
    /// Elements; 0 for an absent tensor.
    pub len: u64,
}

impl Located {
    fn end(&self) -> u64 {
        self.address + self.len * self.dtype.size() as u64
    }
}

/// The tensors of a call, in the plan's order, as long as they are lent.
pub(crate) struct Given<'a> {
    pub tensors: Vec<Located>,
    /// The tensors with work left at the end.
    lent: Vec<Lent<'a>>,
    _checked: Option<Box<dyn Any>>,
}

impl<'a> Given<'a> {
    fn with_capacity(count: usize) -> Self {
        Self { tensors: Vec::with_capacity(count), lent: Vec::new(), _checked: None }
    }

    /// Finishes the loans once the launches are queued.
    ///
    /// # Errors
    /// The driver's.
    pub fn finish(self) -> Result<(), Error> {
        self.lent.into_iter().try_for_each(Lent::finish)
    }
}

impl Core {
    /// Checks and lends tensors to be read.
    ///
    /// # Errors
    /// When they are not the planned ones, lie elsewhere, or are all absent.
    pub fn read<'a>(&self, place: &'a Place, tensors: &'a [&dyn Tensor], planned: Planned) -> Result<Given<'a>, Error> {
        let shapes = tensors.iter().map(|tensor| tensor.shape());
        self.plan.check_by(shapes, planned)?;
        let mut given = Given::with_capacity(tensors.len());
        for (index, tensor) in tensors.iter().enumerate() {
            let shape = tensor.shape();
            let lent = tensor.lend(place);
            self.push(&mut given, index, shape, lent)?;
        }
        self.told(given, planned, false)
    }

    /// Checks and lends tensors to be changed.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write<'a>(
        &self,
        place: &'a Place,
        tensors: &'a mut [&mut dyn TensorMut],
        planned: Planned,
    ) -> Result<Given<'a>, Error> {
        let shapes = tensors.iter().map(|tensor| tensor.shape());
        self.plan.check_by(shapes, planned)?;
        let mut given = Given::with_capacity(tensors.len());
        for (index, tensor) in tensors.iter_mut().enumerate() {
            let shape = tensor.shape();
            let lent = tensor.lend_mut(place);
            self.push(&mut given, index, shape, lent)?;
        }
        self.told(given, planned, true)
    }

    #[inline(always)]
    fn push<'a>(
        &self,
        given: &mut Given<'a>,
        index: usize,
        shape: Option<(DType, u64)>,
        lent: Result<Lent<'a>, Error>,
    ) -> Result<(), Error> {
        let name = || self.plan.tensors()[index].name.clone();
        let lent = lent.map_err(|error| error.named(&self.plan.tensors()[index].name))?;
        let located = match shape {
            Some((dtype, len)) if len > 0 => Located { address: lent.address, dtype, len },
            _ => Located { address: 0, dtype: DType::F32, len: 0 },
        };
        check_address(name, &located)?;
        given.tensors.push(located);
        if lent.is_pending() {
            given.lent.push(lent);
        }
        Ok(())
    }

    fn told<'a>(&self, mut given: Given<'a>, planned: Planned, changed: bool) -> Result<Given<'a>, Error> {
        // A rank may hold no part of a step in which others do.
        let any = self.step.common.chunk_count == 0 || given.tensors.iter().any(|tensor| tensor.len > 0);
        if planned == Planned::Gradients && !any && self.config.features.ranks.is_none() {
            return Err(Error::AllAbsent);
        }
        let mut memory = given.tensors.iter().map(|tensor| (tensor.address, tensor.end() - tensor.address));
        given._checked = self.device.lend(&mut memory, changed);
        Ok(given)
    }

    /// Brings the table of addresses up to date: all tensors, and the weights if given.
    ///
    /// # Errors
    /// [`Error::AddressesChangedInCapture`], or the device's.
    pub fn place(&mut self, tensors: &Given<'_>, weights: Option<&Given<'_>>) -> Result<(), Error> {
        let of = |tensor: &Located| tensor.address;
        let kept: Vec<u64> = match (weights, self.plan.weights()) {
            (Some(weights), _) => weights.tensors.iter().map(of).collect(),
            (None, None) => Vec::new(),
            (None, Some(planned)) => match self.addresses.current() {
                [] => vec![0; planned.len()],
                known => known[planned.len()..].to_vec(),
            },
        };
        let all = Chained { tensors: &tensors.tensors, weights: &kept, next: 0 };
        if self.addresses.set(&*self.device, all)? {
            (self.disjoint, self.apart) = (false, false);
        }
        Ok(())
    }

    /// Does as [`place`](Self::place), before a launch that changes the tensors by the last measurement.
    ///
    /// # Errors
    /// [`Error::NotMeasured`], [`Error::Overlap`], and as there.
    pub fn place_to_change(&mut self, tensors: &Given<'_>) -> Result<(), Error> {
        if !self.measured {
            return Err(Error::NotMeasured);
        }
        self.place(tensors, None)?;
        self.check_overlaps(tensors)
    }

    /// Fails before anything was measured, and where a gradient would be multiplied a second time by the coefficient of then.
    ///
    /// # Errors
    /// [`Error::NotMeasured`], [`Error::AlreadyClipped`].
    pub fn check_unclipped(&self, gradients: &Given<'_>) -> Result<(), Error> {
        if !self.measured {
            return Err(Error::NotMeasured);
        }
        // The host does not see the measurements of a replayed graph.
        let mut pairs = gradients.tensors.iter().zip(&self.clipped);
        match pairs.position(|(tensor, &clipped)| tensor.len > 0 && clipped && !self.promised) {
            Some(index) => Err(Error::AlreadyClipped { name: self.plan.tensors()[index].name.clone() }),
            None => Ok(()),
        }
    }

    /// These have been multiplied.
    pub fn set_clipped(&mut self, gradients: &Given<'_>) {
        for (clipped, tensor) in self.clipped.iter_mut().zip(&gradients.tensors) {
            *clipped |= tensor.len > 0;
        }
    }

    /// Fails if two tensors share memory, which would be changed twice.
    ///
    /// # Errors
    /// [`Error::Overlap`].
    pub fn check_overlaps(&mut self, tensors: &Given<'_>) -> Result<(), Error> {
        if !self.disjoint {
            disjoint(&self.ranges(tensors), str::to_owned)?;
            self.disjoint = true;
        }
        Ok(())
    }

    /// Does the same for an update: gradients may share memory among themselves, but with no weight.
    ///
    /// # Errors
    /// [`Error::Overlap`].
    pub fn check_update(&mut self, gradients: &Given<'_>, weights: &Given<'_>) -> Result<(), Error> {
        self.apart = false;
        disjoint(&self.ranges(weights), weight_of)?;
        self.check_apart(weights, gradients, |weight, gradient| (weight_of(weight), gradient.to_owned()))?;
        self.apart = true;
        Ok(())
    }

    /// Gives the ranges of the tensors that have elements, with their names, from the lowest address on.
    fn ranges(&self, tensors: &Given<'_>) -> Vec<(u64, u64, &str)> {
        let named = self.plan.tensors().iter().zip(&tensors.tensors).filter(|(_, tensor)| tensor.len > 0);
        let mut ranges: Vec<_> = named.map(|(spec, t)| (t.address, t.end(), spec.name.as_str())).collect();
        ranges.sort_unstable();
        ranges
    }

    /// Fails if a tensor to be changed shares memory with one of the others. The changed tensors share none among
    /// themselves. `names` gives the names of two that do.
    ///
    /// # Errors
    /// [`Error::Overlap`].
    pub fn check_apart(
        &self,
        changed: &Given<'_>,
        others: &Given<'_>,
        names: impl Fn(&str, &str) -> (String, String),
    ) -> Result<(), Error> {
        let ranges = self.ranges(changed);
        for (other, spec) in others.tensors.iter().zip(self.plan.tensors()).filter(|(other, _)| other.len > 0) {
            let next = ranges.partition_point(|range| range.1 <= other.address);
            if let Some(range) = ranges.get(next).filter(|range| range.0 < other.end()) {
                let (first, second) = names(range.2, &spec.name);
                return Err(Error::Overlap { first, second });
            }
        }
        Ok(())
    }
}

/// Fails if two of these ranges, from the lowest address on, share memory. `name` gives the name of each.
fn disjoint(ranges: &[(u64, u64, &str)], name: impl Fn(&str) -> String) -> Result<(), Error> {
    match ranges.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        Some([a, b]) => Err(Error::Overlap { first: name(a.2), second: name(b.2) }),
        _ => Ok(()),
    }
}

/// Gives the name of a tensor's weight.
pub(crate) fn weight_of(name: &str) -> String {
    format!("weight of {name}")
}

/// Fails unless elements can lie there. An empty tensor may have any address.
#[inline(always)]
pub(crate) fn check_address(name: impl Fn() -> String, tensor: &Located) -> Result<(), Error> {
    let &Located { address, len, dtype } = tensor;
    let size = dtype.size();
    if len == 0 {
        return Ok(());
    }
    if address == 0 {
        return Err(Error::NullPointer { name: name() });
    }
    if !address.is_multiple_of(size as u64) {
        return Err(Error::MisalignedPointer { name: name(), address, size });
    }
    match len.checked_mul(size as u64).and_then(|bytes| address.checked_add(bytes)) {
        Some(_) => Ok(()),
        None => Err(Error::AddressOverflow { name: name(), address, length: len }),
    }
}

/// Addresses of tensors, then those of weights: a chain with a known length.
#[derive(Clone)]
struct Chained<'a> {
    tensors: &'a [Located],
    weights: &'a [u64],
    next: usize,
}

impl Iterator for Chained<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let index = self.next;
        self.next += 1;
        match self.tensors.get(index) {
            Some(tensor) => Some(tensor.address),
            None => self.weights.get(index - self.tensors.len()).copied(),
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let rest = (self.tensors.len() + self.weights.len()).saturating_sub(self.next);
        (rest, Some(rest))
    }
}

impl ExactSizeIterator for Chained<'_> {}
