//! The parameters of a module and their gradients: names, shapes and types.

use crate::Error;
use burn_core::{
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::{DType as BurnDType, Tensor},
};
use burn_optim::GradientsParams;
use gradprobe::DType;
use std::collections::HashSet;

/// A parameter as it was planned.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: DType,
    /// Whether it is the weight of a linear layer, or its bias.
    pub is_of_linear: bool,
}

/// A float parameter as it was found in a module.
pub struct Found {
    pub name: String,
    pub id: ParamId,
    pub shape: Vec<usize>,
    pub dtype: BurnDType,
    pub requires_gradient: bool,
    pub is_of_linear: bool,
    /// Shape and type of its gradient, if there is one and it differs from the parameter; empty where it does not.
    pub gradient: Option<String>,
}

fn describe(shape: &[usize], dtype: BurnDType) -> String {
    format!("{shape:?} {dtype:?}")
}

/// Gives the type as the probe knows it.
fn known(dtype: BurnDType) -> Option<DType> {
    match dtype {
        BurnDType::F32 => Some(DType::F32),
        BurnDType::F16 => Some(DType::F16),
        BurnDType::BF16 => Some(DType::BF16),
        _ => None,
    }
}

impl Found {
    /// Gives the float parameters of a module in its order, each once, though two fields may share it.
    pub fn in_module<M: Module>(module: &M, gradients: &GradientsParams) -> Vec<Self> {
        let mut survey =
            Survey { gradients, path: Vec::new(), containers: Vec::new(), seen: HashSet::new(), found: Vec::new() };
        module.visit(&mut survey);
        survey.found
    }

    pub fn describe(&self) -> String {
        describe(&self.shape, self.dtype)
    }
}

impl TryFrom<Found> for Parameter {
    type Error = Error;

    fn try_from(found: Found) -> Result<Self, Error> {
        match known(found.dtype) {
            Some(dtype) => {
                let Found { name, shape, is_of_linear, .. } = found;
                Ok(Self { name, shape, dtype, is_of_linear })
            }
            None => Err(Error::Dtype { name: found.name, dtype: format!("{:?}", found.dtype) }),
        }
    }
}

impl Parameter {
    pub fn len(&self) -> u64 {
        self.shape.iter().map(|&length| length as u64).product()
    }

    /// The lengths of the dimensions, the outputs' first. burn's linear layers have the inputs first, its convolutions
    /// and tables do not.
    pub fn lengths(&self) -> Vec<u64> {
        let mut lengths: Vec<u64> = self.shape.iter().map(|&length| length as u64).collect();
        if self.is_of_linear && lengths.len() == 2 {
            lengths.reverse();
        }
        lengths
    }

    /// Describes shape and type in burn's words.
    pub fn describe(&self) -> String {
        let dtype = match self.dtype {
            DType::F32 => BurnDType::F32,
            DType::F16 => BurnDType::F16,
            DType::BF16 => BurnDType::BF16,
        };
        describe(&self.shape, dtype)
    }

    /// Checks that the parameter of this name and its gradient are the planned ones.
    pub fn check(&self, found: &Found) -> Result<(), Error> {
        let name = || self.name.clone();
        if self.shape != found.shape || Some(self.dtype) != known(found.dtype) {
            return Err(Error::Changed { name: name(), planned: self.describe(), given: found.describe() });
        }
        match found.gradient.as_deref() {
            None | Some("") => Ok(()),
            Some(gradient) => {
                Err(Error::Gradient { name: name(), parameter: self.describe(), gradient: gradient.to_owned() })
            }
        }
    }
}

struct Survey<'a> {
    gradients: &'a GradientsParams,
    path: Vec<String>,
    containers: Vec<String>,
    seen: HashSet<ParamId>,
    found: Vec<Found>,
}

impl ModuleVisitor for Survey<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.push(name.to_owned());
        self.containers.push(container.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
        self.containers.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !self.seen.insert(param.id) {
            return;
        }
        let (shape, dtype) = (param.dims().to_vec(), param.dtype());
        let gradient = self.gradients.get::<D>(param.id).map(|gradient| {
            let like = gradient.dims()[..] == shape[..] && gradient.dtype() == dtype;
            if like { String::new() } else { describe(&gradient.dims(), gradient.dtype()) }
        });
        let (name, requires_gradient) = (self.path.join("."), param.is_require_grad());
        let is_of_linear = self.containers.last().is_some_and(|container| container == "Struct:Linear");
        self.found.push(Found { name, id: param.id, shape, dtype, requires_gradient, is_of_linear, gradient });
    }
}
