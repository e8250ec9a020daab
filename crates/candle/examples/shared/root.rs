//! A NaN that real trainings meet.

use candle_core::{Result, Tensor};

/// The same values, with a distance of 0 added: that of `x` from itself, √(x − x)². The slope of a root at 0 is infinite, and
/// times the 0 that is the slope of the square it is NaN.
pub fn with_root_of_zero(x: &Tensor) -> Result<Tensor> {
    x + (x - x.detach())?.sqr()?.sqrt()?
}
