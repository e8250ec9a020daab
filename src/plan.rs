//! The tensors of a step: names, dtypes and lengths, and how they are cut into chunks.

use crate::{DType, Error, Tensor, probe::Planned, spec::CHUNK};
use std::{collections::HashSet, sync::Arc};

/// One tensor of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct TensorSpec {
    /// The name in reports; unique within the plan.
    pub name: String,
    /// Type of its elements.
    pub dtype: DType,
    /// Number of its elements; 0 is valid.
    pub len: u64,
}

/// Lists the tensors of a step, in the order in which every call gives them. It is made once; a step only brings
/// addresses.
///
/// ```
/// use gradprobe::{DType, Plan};
/// let plan = Plan::new([("embed.weight", DType::BF16, 50_304 * 768), ("head.bias", DType::F32, 768)])?;
/// assert_eq!(plan.tensors().len(), 2);
/// # Ok::<(), gradprobe::Error>(())
/// ```
///
/// A clone compares equal at once; plans that were made apart are compared in full.
#[derive(Clone)]
pub struct Plan(Arc<Contents>);

#[derive(Clone, Debug)]
struct Contents {
    tensors: Vec<TensorSpec>,
    /// Chunks of all tensors.
    chunks: usize,
    /// Types of the weights, where they are measured too.
    weights: Option<Vec<DType>>,
    /// Lengths of the dimensions, where they are known.
    shapes: Option<Vec<Vec<u64>>>,
}

impl Plan {
    /// The most elements a plan may hold in all. The accuracy is promised up to there.
    pub const MAX_ELEMENTS: u64 = 1 << 40;

    /// Makes a plan of tensors, each given as (name, dtype, number of elements), in this order.
    ///
    /// # Errors
    /// [`Error::DuplicateTensor`] when two have one name, [`Error::TooLarge`] above 2^40 elements in all.
    pub fn new<N: Into<String>>(tensors: impl IntoIterator<Item = (N, DType, u64)>) -> Result<Self, Error> {
        let tensors: Vec<TensorSpec> =
            tensors.into_iter().map(|(name, dtype, len)| TensorSpec { name: name.into(), dtype, len }).collect();
        let mut names = HashSet::new();
        let mut elements = 0u64;
        let mut chunks = 0usize;
        for TensorSpec { name, len, .. } in &tensors {
            if !names.insert(name) {
                return Err(Error::DuplicateTensor { name: name.clone() });
            }
            let too_large = || Error::TooLarge { name: name.clone(), length: *len };
            elements = elements.saturating_add(*len);
            if elements > Self::MAX_ELEMENTS {
                return Err(too_large());
            }
            chunks += usize::try_from(len.div_ceil(CHUNK as u64)).map_err(|_| too_large())?;
        }
        Ok(Self(Arc::new(Contents { tensors, chunks, weights: None, shapes: None })))
    }

    /// Adds the weights, with these types, one a tensor. A probe can then measure them beside their gradients, in the
    /// same launch. A weight has as many elements as its gradient. Weights get records of their own, and change no
    /// number of the gradients'.
    ///
    /// # Errors
    /// [`Error::TensorCount`] when there are not as many types as tensors.
    pub fn with_weights(self, dtypes: impl IntoIterator<Item = DType>) -> Result<Self, Error> {
        let dtypes: Vec<DType> = dtypes.into_iter().collect();
        self.check_count(dtypes.len())?;
        Ok(self.with(|contents| contents.weights = Some(dtypes)))
    }

    /// Adds the shapes of the tensors, one a tensor: the outputs' dimension first, as in PyTorch and candle, and rows
    /// first in a table of embeddings. No measured number depends on them, and plans that differ in shapes alone are
    /// equal. [`health`](crate::health) uses them to tell weights from biases, and to count the inputs that a weight
    /// sums over.
    ///
    /// # Errors
    /// [`Error::TensorCount`] when there are not as many shapes as tensors. [`Error::InvalidConfig`], which names the
    /// tensor, for a shape of another number of elements.
    pub fn with_shapes<S: Into<Vec<u64>>>(self, shapes: impl IntoIterator<Item = S>) -> Result<Self, Error> {
        let shapes: Vec<Vec<u64>> = shapes.into_iter().map(Into::into).collect();
        self.check_count(shapes.len())?;
        for (TensorSpec { name, len, .. }, shape) in self.tensors().iter().zip(&shapes) {
            if shape.iter().try_fold(1u64, |product, &length| product.checked_mul(length)) != Some(*len) {
                let expected = "of as many elements as the plan's tensors";
                let value = format!("{shape:?} of {name:?}, which has {len}");
                return Err(Error::InvalidConfig { option: "shapes", expected, value });
            }
        }
        Ok(self.with(|contents| contents.shapes = Some(shapes)))
    }

    /// Checks the number of items in a list that has no types and lengths of its own.
    ///
    /// # Errors
    /// [`Error::TensorCount`] unless there is one a tensor.
    pub(crate) fn check_count(&self, given: usize) -> Result<(), Error> {
        if self.tensors().len() == given { Ok(()) } else { Err(self.count_differs(given, given)) }
    }

    /// Makes the error of a list of the wrong length, of which this is the first item that differs.
    fn count_differs(&self, given: usize, first: usize) -> Error {
        let first = self.tensors().get(first).map(|tensor| tensor.name.clone());
        Error::TensorCount { planned: self.tensors().len(), given, first }
    }

    /// Checks that a report is of this plan.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`], which names the first tensor that differs.
    pub(crate) fn check_report(&self, of: &Plan) -> Result<(), Error> {
        let differs = |(name, what)| Err(Error::ReportOfAnotherPlan { name, what });
        self.difference(of).map_or(Ok(()), differs)
    }

    /// Checks that an item beside a report is of the report's plan.
    ///
    /// # Errors
    /// [`Error::EntryOfAnotherPlan`], which names the first tensor that differs.
    pub(crate) fn check_entry(&self, of: &Plan, entry: &'static str) -> Result<(), Error> {
        let differs = |(name, what)| Err(Error::EntryOfAnotherPlan { entry, name, what });
        self.difference(of).map_or(Ok(()), differs)
    }

    fn difference(&self, other: &Plan) -> Option<(String, String)> {
        if self == other {
            return None;
        }
        let described = |plan: &Plan| {
            let weights = plan.weights().map(<[_]>::to_vec);
            let of = move |(index, spec): (usize, &TensorSpec)| {
                let weight = weights.as_ref().map_or(String::new(), |dtypes| format!(", {} weights", dtypes[index]));
                (spec.name.clone(), format!("{} {} elements{weight}", spec.len, spec.dtype))
            };
            plan.tensors().iter().enumerate().map(of).collect::<Vec<_>>()
        };
        first_difference(described(self), described(other))
    }

    fn with(mut self, change: impl FnOnce(&mut Contents)) -> Self {
        change(Arc::make_mut(&mut self.0));
        self
    }

    /// Lengths of each tensor's dimensions, in a plan [`with_shapes`](Self::with_shapes).
    pub fn shapes(&self) -> Option<&[Vec<u64>]> {
        self.0.shapes.as_deref()
    }

    /// Types of the weights, one a tensor, in a plan [`with_weights`](Self::with_weights).
    pub fn weights(&self) -> Option<&[DType]> {
        self.0.weights.as_deref()
    }

    /// Types of the weights that an optimizer moves. Unless the plan has other ones, those of the gradients.
    pub(crate) fn updated(&self) -> Vec<DType> {
        self.weights().map_or_else(|| self.tensors().iter().map(|tensor| tensor.dtype).collect(), <[_]>::to_vec)
    }

    /// The tensors, in order.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.0.tensors
    }

    /// Elements of all the tensors.
    pub fn elements(&self) -> u64 {
        self.tensors().iter().map(|t| t.len).sum()
    }

    /// Bytes of all the tensors, which one read moves.
    pub fn bytes(&self) -> u64 {
        self.tensors().iter().map(|t| t.len * t.dtype.size() as u64).sum()
    }

    /// Chunks of all the tensors.
    pub(crate) fn chunks(&self) -> usize {
        self.0.chunks
    }

    /// Checks that a step gives the planned tensors. `None` stands for an absent tensor.
    ///
    /// # Errors
    /// [`Error::TensorCount`] or [`Error::TensorMismatch`], which names the first tensor that differs;
    /// [`Error::NotDeclared`] for weights when the plan has none.
    pub(crate) fn check_by(
        &self,
        given: impl ExactSizeIterator<Item = Option<(DType, u64)>>,
        planned: Planned,
    ) -> Result<(), Error> {
        let tensors = self.tensors();
        if planned == Planned::Weights && self.weights().is_none() {
            return Err(Error::NotDeclared { declare: "Plan::with_weights" });
        }
        let count = given.len();
        for (index, (spec, given)) in tensors.iter().zip(given).enumerate() {
            let Some((dtype, len)) = given else { continue };
            let planned = match planned {
                Planned::Gradients => Some(spec.dtype),
                Planned::Weights => self.weights().map(|weights| weights[index]),
                Planned::Updated => Some(self.weights().map_or(spec.dtype, |weights| weights[index])),
                Planned::Lengths => None,
            };
            if spec.len != len || planned.is_some_and(|planned| planned != dtype) {
                if count != tensors.len() {
                    return Err(self.count_differs(count, index));
                }
                return Err(Error::TensorMismatch {
                    name: spec.name.clone(),
                    planned: match planned {
                        Some(dtype) => format!("{} {dtype} elements", spec.len),
                        None => format!("{} elements", spec.len),
                    },
                    given: format!("{len} {dtype} elements"),
                });
            }
        }
        self.check_count(count)
    }

    /// Makes a plan of these tensors under these names, from their types and lengths. They may lie on any device.
    ///
    /// ```
    /// use gradprobe::{Plan, Tensor};
    /// let (weight, bias) = (vec![0.0f32; 4096], vec![half::bf16::ZERO; 64]);
    /// let plan = Plan::of([("weight", &weight as &dyn Tensor), ("bias", &bias)])?;
    /// assert_eq!(plan.elements(), 4160);
    /// # Ok::<(), gradprobe::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`Plan::new`], and [`Error::AbsentInPlan`].
    pub fn of<'a, N: Into<String>>(tensors: impl IntoIterator<Item = (N, &'a dyn Tensor)>) -> Result<Self, Error> {
        let shaped = |(name, tensor): (N, &dyn Tensor)| {
            let name = name.into();
            match tensor.shape() {
                Some((dtype, len)) => Ok((name, dtype, len)),
                None => Err(Error::AbsentInPlan { name }),
            }
        };
        Self::new(tensors.into_iter().map(shaped).collect::<Result<Vec<_>, _>>()?)
    }
}

/// Gives the first tensor by which two lists of names and descriptions differ, and the difference.
pub(crate) fn first_difference<N: AsRef<str>>(
    here: impl IntoIterator<Item = (N, String)>,
    there: impl IntoIterator<Item = (N, String)>,
) -> Option<(String, String)> {
    let (mut here, mut there) = (here.into_iter(), there.into_iter());
    loop {
        let (name, what) = match (here.next(), there.next()) {
            (None, None) => return None,
            (Some((name, here)), Some((other, there))) => match (name.as_ref() == other.as_ref(), here == there) {
                (true, true) => continue,
                (true, false) => (name, format!("it has {there} there, {here} here")),
                (false, _) => (name, format!("it has {:?} in its place", other.as_ref())),
            },
            (Some((name, _)), None) => (name, "it does not have that tensor".to_owned()),
            (None, Some((name, _))) => (name, "only it has that tensor".to_owned()),
        };
        return Some((name.as_ref().to_owned(), what));
    }
}

impl PartialEq for Plan {
    fn eq(&self, other: &Self) -> bool {
        // Shapes change no measured number, so plans are equal without them.
        Arc::ptr_eq(&self.0, &other.0) || (self.tensors() == other.tensors() && self.weights() == other.weights())
    }
}

impl Eq for Plan {}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_each_tensor_and_empties_have_none() {
        let n = CHUNK as u64;
        let plan =
            Plan::new([("a", DType::F32, 0), ("b", DType::F16, n), ("c", DType::BF16, 0), ("d", DType::F32, n + 1)]);
        let plan = plan.unwrap();
        assert_eq!((plan.chunks(), plan.elements(), plan.bytes()), (3, 2 * n + 1, 6 * n + 4));
    }

    #[test]
    fn refuses_two_of_a_name_and_too_many_elements() {
        let twice = Plan::new([("a", DType::F32, 1), ("a", DType::F32, 1)]);
        assert_eq!(twice, Err(Error::DuplicateTensor { name: "a".into() }));
        for lengths in [[u64::MAX, 1], [1 << 39, (1 << 39) + 1]] {
            let large = Plan::new([("a", DType::F32, lengths[0]), ("b", DType::F32, lengths[1])]);
            assert!(matches!(large, Err(Error::TooLarge { .. })), "{large:?}");
        }
    }
}
