//! The memory of a gradient, and whether another tensor shares it.

use crate::{
    Error,
    variables::{Found, Planned},
};
use candle_core::{Layout, Tensor, backprop::GradStore};
use std::{collections::HashSet, ops::Range, ptr};

/// Gives every gradient that is strided, or in the memory of another gradient or of a variable, memory of its own, and
/// puts that into the store. Scaled in place, shared memory would be scaled twice, or a weight with it.
///
/// # Errors
/// [`Error::Candle`] when memory runs out.
pub fn make_own(gradients: &mut GradStore, planned: &[Planned], found: &mut [Found]) -> Result<(), Error> {
    let mut used: HashSet<usize> = found.iter().map(|found| memory_of(&found.variable)).collect();
    for (found, planned) in found.iter_mut().zip(planned) {
        let Some(gradient) = &mut found.gradient else { continue };
        if gradient.is_contiguous() && used.insert(memory_of(gradient)) {
            continue;
        }
        *gradient = copied(&planned.name, gradient.force_contiguous())?.detach();
        gradients.insert(&found.variable, gradient.clone());
    }
    Ok(())
}

/// Copies every gradient that is in the memory of a variable: while variables are changed, nothing else reads them.
///
/// # Errors
/// [`Error::Memory`] for a variable that is strided, or in the memory of another; [`Error::Candle`] when memory runs
/// out.
pub fn apart(planned: &[Planned], found: &mut [Found]) -> Result<(), Error> {
    let mut used: HashSet<usize> = HashSet::new();
    for (found, planned) in found.iter().zip(planned) {
        let refuse = |what| Err(Error::Memory { name: planned.name.clone(), what });
        if !found.variable.is_contiguous() {
            return refuse("its elements are not in order");
        }
        if !used.insert(memory_of(&found.variable)) {
            return refuse("it is in the memory of another variable");
        }
    }
    for (found, planned) in found.iter_mut().zip(planned) {
        if let Some(gradient) = found.gradient.as_mut().filter(|gradient| used.contains(&memory_of(gradient))) {
            *gradient = copied(&planned.name, gradient.force_contiguous())?;
        }
    }
    Ok(())
}

/// Gives the tensor with its elements in order, as a copy if they are not.
///
/// # Errors
/// [`Error::Candle`] when memory runs out.
pub fn in_order(name: &str, tensor: &Tensor) -> Result<Tensor, Error> {
    copied(name, tensor.contiguous())
}

fn copied(name: &str, copy: candle_core::Result<Tensor>) -> Result<Tensor, Error> {
    copy.map_err(|source| Error::Candle { name: name.to_owned(), source })
}

/// A number that two tensors have in common just when they share memory.
fn memory_of(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    ptr::from_ref(&*storage).addr()
}

/// Gives the place of a contiguous tensor in its storage.
pub fn range(layout: &Layout) -> Range<usize> {
    layout.start_offset()..layout.start_offset() + layout.shape().elem_count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_fails_is_named() {
        let failed = Err(candle_core::Error::Msg("out of memory".to_owned()));
        let failed = copied("h.0.weight", failed).unwrap_err().to_string();
        assert_eq!(failed, "variable \"h.0.weight\": out of memory");
    }
}
