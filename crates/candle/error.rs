//! The errors between candle and the probe.

/// Names every failure. A message names the variable at fault where there is one; nothing has been clipped when an
/// error is returned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is nothing to measure: a `VarMap` is empty until the model is built with it.
    #[error("there are no variables: make the probe after the model, which fills the VarMap")]
    NoVariables,
    /// A variable has a type that cannot be measured.
    #[error("variable {name:?}: {dtype} is not measured; f32, f16 and bf16 are (`of_variables` can leave it out)")]
    Dtype {
        /// The variable's name.
        name: String,
        /// Its type, in candle's words.
        dtype: &'static str,
    },
    /// A variable is on a device that cannot be measured, or not on that of the first variable.
    #[error("variable {name:?} is on {device}: {expected}")]
    Device {
        /// The variable's name.
        name: String,
        /// Its device.
        device: String,
        /// The possible devices.
        expected: String,
    },
    /// The model is not the one the probe was made for.
    #[error("variable {name:?}: the plan has {planned}, the model has {given}")]
    Changed {
        /// The first variable that differs.
        name: String,
        /// Shape, type and device in the plan, or `nothing`.
        planned: String,
        /// Shape, type and device in the model, or `nothing`.
        given: String,
    },
    /// A gradient differs from its variable in shape, type or device.
    #[error("variable {name:?} is {variable}, its gradient {gradient}")]
    Gradient {
        /// The variable's name.
        name: String,
        /// Its shape, type and device.
        variable: String,
        /// Those of the gradient.
        gradient: String,
    },
    /// No variable has a gradient: the store is of the backward pass of another model, most likely.
    #[error(
        "none of the {variables} variables has a gradient, {name:?} the first: is the GradStore of this model's loss?"
    )]
    NoGradients {
        /// The first variable's name.
        name: String,
        /// Number of variables.
        variables: usize,
    },
    /// A variable cannot be changed in place.
    #[error("variable {name:?} cannot be changed in place: {what}")]
    Memory {
        /// The variable's name.
        name: String,
        /// The reason.
        what: &'static str,
    },
    /// candle could not copy or give a tensor.
    #[error("variable {name:?}: {source}")]
    Candle {
        /// The variable's name.
        name: String,
        /// candle's error.
        source: candle_core::Error,
    },
    /// The probe's own error.
    #[error(transparent)]
    Probe(#[from] gradprobe::Error),
}
