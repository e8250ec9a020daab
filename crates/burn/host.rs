//! The elements of gradients on the host: taken out of burn's tensors, measured and clipped where they are, put back.

use crate::{Error, parameters::Found};
use burn_core::{
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::{DType, Tensor, TensorData},
};
use burn_optim::GradientsParams;
use gradprobe::{HostTensorMut, TensorMut};
use half::{bf16, f16};
use std::collections::HashMap;

/// Puts the elements back into a tensor in their old place. Only the code that takes them knows the number of
/// dimensions.
type PutBack = Box<dyn FnOnce(TensorData, &mut GradientsParams)>;

/// One gradient outside of its tensor.
struct Taken {
    name: String,
    data: TensorData,
    put_back: PutBack,
}

/// The gradients of a step, in the module's order, until they are put back.
pub struct Borrowed(Vec<Taken>);

impl Borrowed {
    /// Takes all gradients out. Gradients without another owner are not copied on burn's CPU backend: a tensor whose
    /// buffer has one owner gives that very buffer.
    ///
    /// # Errors
    /// [`Error::Read`]; all but that one gradient are put back.
    pub fn take<M: Module>(module: &M, gradients: &mut GradientsParams, found: &[Found]) -> Result<Self, Error> {
        let names = found.iter().map(|found| (found.id, found.name.as_str())).collect();
        let mut collector = Collector { gradients, names, taken: Vec::new(), failed: None };
        module.visit(&mut collector);
        let (taken, failed) = (Self(collector.taken), collector.failed);
        match failed {
            None => Ok(taken),
            Some(error) => {
                taken.put_back(gradients);
                Err(error)
            }
        }
    }

    /// Gives them to `does` in the plan's order. `places` has, for each parameter of the plan, the place of its
    /// gradient among these.
    ///
    /// # Errors
    /// [`Error::Read`], and those of `does`.
    pub fn lend<R>(
        &mut self,
        places: &[Option<usize>],
        does: impl FnOnce(&mut [&mut dyn TensorMut]) -> Result<R, gradprobe::Error>,
    ) -> Result<R, Error> {
        let taken = self.0.iter_mut().map(elements_mut).collect::<Result<Vec<_>, _>>()?;
        let mut taken: Vec<Option<HostTensorMut<'_>>> = taken.into_iter().map(Some).collect();
        let planned = places.iter().map(|place| place.and_then(|place| taken[place].take()));
        let mut planned: Vec<Option<HostTensorMut<'_>>> = planned.collect();
        let mut tensors: Vec<&mut dyn TensorMut> = planned.iter_mut().map(|tensor| tensor as _).collect();
        Ok(does(&mut tensors)?)
    }

    /// Puts all gradients back in their places.
    pub fn put_back(self, gradients: &mut GradientsParams) {
        for Taken { data, put_back, .. } in self.0 {
            put_back(data, gradients);
        }
    }
}

fn unreadable(name: &str, reason: &impl ToString) -> Error {
    Error::Read { name: name.to_owned(), reason: reason.to_string() }
}

fn elements_mut(taken: &mut Taken) -> Result<HostTensorMut<'_>, Error> {
    let Taken { name, data, .. } = taken;
    let elements = match data.dtype() {
        DType::F32 => data.as_mut_slice::<f32>().map(HostTensorMut::F32),
        DType::F16 => data.as_mut_slice::<f16>().map(HostTensorMut::F16),
        DType::BF16 => data.as_mut_slice::<bf16>().map(HostTensorMut::BF16),
        dtype => return Err(Error::Dtype { name: name.clone(), dtype: format!("{dtype:?}") }),
    };
    elements.map_err(|error| unreadable(name, &error))
}

struct Collector<'a> {
    gradients: &'a mut GradientsParams,
    names: HashMap<ParamId, &'a str>,
    taken: Vec<Taken>,
    failed: Option<Error>,
}

impl ModuleVisitor for Collector<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let id = param.id;
        if self.failed.is_some() {
            return;
        }
        let Some(gradient) = self.gradients.remove::<D>(id) else { return };
        let name = self.names.get(&id).copied().unwrap_or_default();
        let (device, dtype) = (gradient.device(), gradient.dtype());
        match gradient.try_into_data() {
            Ok(data) => {
                let put_back = move |data, gradients: &mut GradientsParams| {
                    gradients.register(id, Tensor::<D>::from_data(data, (&device, dtype)));
                };
                self.taken.push(Taken { name: name.to_owned(), data, put_back: Box::new(put_back) });
            }
            Err(error) => self.failed = Some(unreadable(name, &error)),
        }
    }
}
