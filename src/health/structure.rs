//! The role of a tensor in its model, as far as shapes, lengths and names tell: weight or bias, its module, and the
//! tensors beside it.

use super::{Groups, TensorType, names, threshold::count_to_f64};
use crate::Plan;
use std::collections::HashMap;

/// Known from the plan.
#[derive(Clone, Debug)]
pub(super) struct Structure {
    /// The module of each tensor: tensors that differ only in the last part of their names share one.
    pub modules: Vec<usize>,
    /// The tensors of each module.
    pub members: Vec<Vec<usize>>,
    /// Whether it is a weight, which sums over more than one input, by all but its first dimension. Without shapes, the
    /// largest of its module is, unless its name begins with a b, as those of biases do.
    pub is_weight: Vec<bool>,
    has_shapes: bool,
    /// √ of the inputs that a weight sums over, where shapes are known. `None` for biases and for tables, whose rows
    /// are looked up.
    pub fan_in_roots: Vec<Option<f64>>,
    /// The stack of each tensor: names that differ only in numbers, such as experts and layers, share one.
    pub stacks: Vec<usize>,
}

impl Structure {
    pub fn of(plan: &Plan) -> Self {
        let tensors = plan.tensors();
        let groups = Groups::by_layer(plan);
        let modules: Vec<usize> = groups.of_tensors().iter().flatten().copied().collect();
        let mut members: Vec<Vec<usize>> = vec![Vec::new(); groups.names().len()];
        modules.iter().enumerate().for_each(|(index, &module)| members[module].push(index));
        let is_weight = |index: usize| match plan.shapes() {
            Some(shapes) => inputs_of(&shapes[index]) > 1,
            // The first of the largest.
            None => {
                let last = tensors[index].name.rsplit(['.', '/', ':']).next();
                let is_largest =
                    || members[modules[index]].iter().all(|&other| tensors[other].len <= tensors[index].len);
                !last.is_some_and(|last| last.starts_with(['b', 'B'])) && is_largest()
            }
        };
        let is_weight: Vec<bool> = (0..tensors.len()).map(is_weight).collect();
        // Tables of embeddings and positions: only the name tells.
        let is_table = |index: usize| TensorType::of(&tensors[index].name) == TensorType::Embedding;
        let fan_in_root = |index: usize| {
            let inputs = inputs_of(&plan.shapes()?[index]);
            Some(count_to_f64(inputs).sqrt())
        };
        let fan_in_roots = (0..tensors.len())
            .map(|index| if is_weight[index] && !is_table(index) { fan_in_root(index) } else { None })
            .collect();
        let mut known = HashMap::new();
        let stacks = tensors.iter().map(|tensor| {
            let next = known.len();
            *known.entry(names::without_numbers(&tensor.name)).or_insert(next)
        });
        let stacks = stacks.collect();
        Self { modules, members, is_weight, has_shapes: plan.shapes().is_some(), fan_in_roots, stacks }
    }

    /// The tensors of this one's module.
    pub fn module_of(&self, tensor: usize) -> &[usize] {
        &self.members[self.modules[tensor]]
    }

    /// Whether its elements are units: a bias beside a weight, as its shape shows.
    pub fn has_units(&self, tensor: usize) -> bool {
        let is_bias = !self.is_weight[tensor] && self.module_of(tensor).iter().any(|&other| self.is_weight[other]);
        self.has_shapes && is_bias
    }

    /// Whether its module has weights alone, without a bias that shows their units.
    pub fn is_alone(&self, tensor: usize) -> bool {
        self.module_of(tensor).iter().all(|&other| self.is_weight[other])
    }
}

/// Elements that each output sums over: 1 for a vector.
fn inputs_of(shape: &[u64]) -> u64 {
    shape.iter().skip(1).fold(1, |inputs, &length| inputs.saturating_mul(length))
}
