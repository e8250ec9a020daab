//! The first values of weights. candle's generator cannot be seeded on the CPU.

use candle_core::{Device, Result, Tensor};
use candle_nn::VarMap;
use std::sync::PoisonError;

/// Gives every matrix, and every kernel of a convolution, normal values: `deviation` tells theirs from the name and from 1/√n,
/// where n are the inputs of a unit. Every bias becomes 0; what else has one dimension stays as it was made.
pub fn fill(
    variables: &mut VarMap,
    names: &[String],
    random: &mut fastrand::Rng,
    deviation: impl Fn(&str, f32) -> f32,
) -> Result<()> {
    let shapes: Vec<Vec<usize>> = {
        let data = variables.data().lock().unwrap_or_else(PoisonError::into_inner);
        names.iter().map(|name| data[name].dims().to_vec()).collect()
    };
    for (name, shape) in names.iter().zip(shapes) {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = if shape.len() > 1 {
            let inputs = (count / shape[0]) as f32;
            let deviation = deviation(name, 1.0 / inputs.sqrt());
            (0..count).map(|_| deviation * normal(random)).collect()
        } else if name.ends_with("bias") {
            vec![0.0; count]
        } else {
            continue;
        };
        set(variables, name, &Tensor::from_vec(values, shape, &Device::Cpu)?)?;
    }
    Ok(())
}

/// Gives a variable values, which become of its type.
pub fn set(variables: &mut VarMap, name: &str, values: &Tensor) -> Result<()> {
    let values = {
        let data = variables.data().lock().unwrap_or_else(PoisonError::into_inner);
        values.to_dtype(data[name].dtype())?.to_device(data[name].device())?
    };
    variables.set_one(name, values)
}

/// A standard normal number, by Box and Muller.
pub fn normal(random: &mut fastrand::Rng) -> f32 {
    (-2.0 * (1.0 - random.f32()).ln()).sqrt() * (std::f32::consts::TAU * random.f32()).cos()
}
