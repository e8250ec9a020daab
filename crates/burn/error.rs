//! The errors between burn and the probe.

/// Names every failure. Every message names the parameter at fault; nothing has been clipped when an error is returned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A parameter, or its gradient, has a type that cannot be measured.
    #[error("parameter {name:?}: {dtype} is not measured; f32, f16 and bf16 are")]
    Dtype {
        /// The parameter's name.
        name: String,
        /// Its type, in burn's words.
        dtype: String,
    },
    /// The module is not the one the probe was made for.
    #[error("parameter {name:?}: the plan has {planned}, the module has {given}")]
    Changed {
        /// The first parameter that differs.
        name: String,
        /// Shape and type in the plan, or `nothing`.
        planned: String,
        /// Shape and type in the module, or `nothing`.
        given: String,
    },
    /// A gradient has another shape or type than its parameter.
    #[error("parameter {name:?} is {parameter}, its gradient {gradient}")]
    Gradient {
        /// The parameter's name.
        name: String,
        /// Its shape and type.
        parameter: String,
        /// Those of the gradient.
        gradient: String,
    },
    /// There are gradients of parameters that the module does not have: burn does not tell their names.
    #[error("{count} gradients belong to no parameter of the module")]
    UnknownGradients {
        /// Number of these gradients.
        count: usize,
    },
    /// burn could not give a gradient's elements.
    #[error("parameter {name:?}: its gradient cannot be read: {reason}")]
    Read {
        /// The parameter's name.
        name: String,
        /// burn's error.
        reason: String,
    },
    /// The probe's own error.
    #[error(transparent)]
    Probe(#[from] gradprobe::Error),
}
