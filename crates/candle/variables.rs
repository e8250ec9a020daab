//! The variables of a model: their source, the planned ones, and the check that they still are the same.

use crate::{Error, natural};
use candle_core::{DType, Device, DeviceLocation, Shape, Tensor, TensorId, Var, backprop::GradStore};
use candle_nn::VarMap;
use std::{collections::HashSet, sync::PoisonError};

/// The source of the variables in each step.
#[derive(Clone)]
pub enum Source {
    /// Looked up by name every step: it may have changed.
    Map(VarMap),
    /// Always the same.
    List(Vec<Var>),
}

/// A variable as it was planned.
#[derive(Clone, Debug)]
pub struct Planned {
    pub name: String,
    pub shape: Shape,
    pub dtype: DType,
    pub device: Device,
}

/// A variable in a step, with its gradient if it has one.
pub struct Found {
    pub variable: Var,
    pub gradient: Option<Tensor>,
}

/// All variables of a map in the natural order of their names.
pub fn of_map(map: &VarMap) -> Vec<(String, Var)> {
    let data = map.data().lock().unwrap_or_else(PoisonError::into_inner);
    let mut variables: Vec<_> = data.iter().map(|(name, variable)| (name.clone(), variable.clone())).collect();
    variables.sort_by(|a, b| natural::compare(&a.0, &b.0));
    variables
}

/// Gives the type as the probe knows it.
pub fn known(dtype: DType) -> Option<gradprobe::DType> {
    match dtype {
        DType::F32 => Some(gradprobe::DType::F32),
        DType::F16 => Some(gradprobe::DType::F16),
        DType::BF16 => Some(gradprobe::DType::BF16),
        _ => None,
    }
}

fn name_of(place: DeviceLocation) -> String {
    match place {
        DeviceLocation::Cpu => "cpu".to_owned(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

fn describe(shape: &Shape, dtype: DType, device: &Device) -> String {
    format!("{:?} {} on {}", shape.dims(), dtype.as_str(), name_of(device.location()))
}

fn describe_tensor(tensor: &Tensor) -> String {
    describe(tensor.shape(), tensor.dtype(), tensor.device())
}

impl Planned {
    pub fn new(name: String, tensor: &Tensor) -> Self {
        Self { name, shape: tensor.shape().clone(), dtype: tensor.dtype(), device: tensor.device().clone() }
    }

    /// Its type as the probe knows it.
    ///
    /// # Errors
    /// [`Error::Dtype`].
    pub fn known_dtype(&self) -> Result<gradprobe::DType, Error> {
        known(self.dtype).ok_or_else(|| Error::Dtype { name: self.name.clone(), dtype: self.dtype.as_str() })
    }

    pub fn len(&self) -> u64 {
        self.shape.elem_count() as u64
    }

    /// The lengths of its dimensions.
    pub fn lengths(&self) -> Vec<u64> {
        self.shape.dims().iter().map(|&length| length as u64).collect()
    }

    /// Shape, type and device.
    pub fn describe(&self) -> String {
        describe(&self.shape, self.dtype, &self.device)
    }

    fn is_like(&self, tensor: &Tensor) -> bool {
        self.shape == *tensor.shape() && self.dtype == tensor.dtype() && self.device.same_device(tensor.device())
    }
}

/// The one device of all of them.
///
/// # Errors
/// [`Error::NoVariables`]; [`Error::Device`] when they are on several, or on one that cannot be measured.
pub fn device(planned: &[Planned]) -> Result<&Device, Error> {
    let places: Vec<_> = planned.iter().map(|variable| (variable.name.as_str(), variable.device.location())).collect();
    check_places(&places)?;
    Ok(&planned[0].device)
}

fn check_places(places: &[(&str, DeviceLocation)]) -> Result<(), Error> {
    let &(first, place) = places.first().ok_or(Error::NoVariables)?;
    let refuse = |name: &str, place, expected: String| {
        Err(Error::Device { name: name.to_owned(), device: name_of(place), expected })
    };
    if let Some(&(name, other)) = places.iter().find(|(_, other)| *other != place) {
        let expected = format!("{first:?} is on {}, and a probe is for one device", name_of(place));
        return refuse(name, other, expected);
    }
    match place {
        DeviceLocation::Cpu => Ok(()),
        DeviceLocation::Cuda { .. } if cfg!(feature = "cuda") => Ok(()),
        _ => refuse(first, place, "the CPU is measured, and CUDA devices with the feature `cuda`".to_owned()),
    }
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Map(_) => "Map",
            Self::List(_) => "List",
        })
    }
}

impl Source {
    /// Finds the planned variables as they are now, with their gradients.
    ///
    /// # Errors
    /// [`Error::Changed`], [`Error::Gradient`], [`Error::NoGradients`].
    pub fn find(&self, planned: &[Planned], gradients: &GradStore) -> Result<Vec<Found>, Error> {
        let variables = match self {
            Self::List(variables) => variables.clone(),
            Self::Map(map) => current(map, planned)?,
        };
        let found = |(variable, planned): (Var, &Planned)| {
            let gradient = gradients.get(&variable).cloned();
            match gradient {
                Some(gradient) if !planned.is_like(&gradient) => Err(Error::Gradient {
                    name: planned.name.clone(),
                    variable: planned.describe(),
                    gradient: describe_tensor(&gradient),
                }),
                gradient => Ok(Found { variable, gradient }),
            }
        };
        let found = variables.into_iter().zip(planned).map(found).collect::<Result<Vec<_>, _>>()?;
        if found.iter().all(|found| found.gradient.is_none()) {
            return Err(Error::NoGradients { name: planned[0].name.clone(), variables: planned.len() });
        }
        Ok(found)
    }
}

/// Gives a map's variables of the planned names, after a check that it has neither more nor other ones.
fn current(map: &VarMap, planned: &[Planned]) -> Result<Vec<Var>, Error> {
    let nothing = || "nothing".to_owned();
    let data = map.data().lock().unwrap_or_else(PoisonError::into_inner);
    let same = |planned: &Planned| match data.get(&planned.name) {
        Some(variable) if planned.is_like(variable) => Ok(variable.clone()),
        other => Err(Error::Changed {
            name: planned.name.clone(),
            planned: planned.describe(),
            given: other.map_or_else(nothing, |variable| describe_tensor(variable)),
        }),
    };
    let variables = planned.iter().map(same).collect::<Result<Vec<_>, _>>()?;
    if data.len() > planned.len() {
        // Under another name a planned variable is nothing new.
        let known: HashSet<TensorId> = variables.iter().map(|variable| variable.id()).collect();
        let new = data.iter().filter(|(_, variable)| !known.contains(&variable.id()));
        if let Some((name, variable)) = new.min_by(|a, b| natural::compare(a.0, b.0)) {
            let given = describe_tensor(variable);
            return Err(Error::Changed { name: name.clone(), planned: nothing(), given });
        }
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_measured_is_refused() {
        let refused = check_places(&[("w", DeviceLocation::Metal { gpu_id: 1 })]).unwrap_err();
        assert!(matches!(&refused, Error::Device { name, .. } if name == "w"), "{refused}");
        let told = "variable \"w\" is on metal:1: the CPU is measured, and CUDA devices with the feature `cuda`";
        assert_eq!(refused.to_string(), told);
        let without = check_places(&[("w", DeviceLocation::Cuda { gpu_id: 0 })]).is_err();
        assert_eq!(without, !cfg!(feature = "cuda"));
    }

    #[test]
    fn two_devices_are_refused() {
        let places =
            [("w", DeviceLocation::Cpu), ("v", DeviceLocation::Cpu), ("b", DeviceLocation::Cuda { gpu_id: 0 })];
        let refused = check_places(&places).unwrap_err().to_string();
        assert_eq!(refused, "variable \"b\" is on cuda:0: \"w\" is on cpu, and a probe is for one device");
    }
}
