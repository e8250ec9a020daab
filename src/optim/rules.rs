//! The rules of the optimizers, for one element: `kernels/optimizer.cu` has the same operations in the same order.

/// A rule: moves the moments of an element and gives the direction, before decay, that is subtracted from the weight.
pub(super) trait Direction: Copy + Send + Sync {
    const MOMENTS: usize;
    fn direction(&self, gradient: f32, first: &mut f32, second: &mut f32) -> f32;
}

#[derive(Clone, Copy)]
pub(super) struct AdamW {
    pub beta1: f32,
    pub rest1: f32,
    pub beta2: f32,
    pub rest2: f32,
    pub root_factor: f32,
    pub epsilon: f32,
}

impl Direction for AdamW {
    const MOMENTS: usize = 2;
    #[inline(always)]
    fn direction(&self, gradient: f32, first: &mut f32, second: &mut f32) -> f32 {
        *first = self.beta1.mul_add(*first, self.rest1 * gradient);
        *second = self.beta2.mul_add(*second, self.rest2 * gradient * gradient);
        *first / second.sqrt().mul_add(self.root_factor, self.epsilon)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Momentum<const NESTEROV: bool> {
    pub momentum: f32,
}

impl<const NESTEROV: bool> Direction for Momentum<NESTEROV> {
    const MOMENTS: usize = 1;
    #[inline(always)]
    fn direction(&self, gradient: f32, first: &mut f32, _: &mut f32) -> f32 {
        *first = self.momentum.mul_add(*first, gradient);
        if NESTEROV { self.momentum.mul_add(*first, gradient) } else { *first }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Sgd;

impl Direction for Sgd {
    const MOMENTS: usize = 0;
    #[inline(always)]
    fn direction(&self, gradient: f32, _: &mut f32, _: &mut f32) -> f32 {
        gradient
    }
}

#[derive(Clone, Copy)]
pub(super) struct Lion {
    pub beta1: f32,
    pub rest1: f32,
    pub beta2: f32,
    pub rest2: f32,
}

impl Direction for Lion {
    const MOMENTS: usize = 1;
    #[inline(always)]
    fn direction(&self, gradient: f32, first: &mut f32, _: &mut f32) -> f32 {
        let mean = self.beta1.mul_add(*first, self.rest1 * gradient);
        *first = self.beta2.mul_add(*first, self.rest2 * gradient);
        if mean > 0.0 {
            1.0
        } else if mean < 0.0 {
            -1.0
        } else {
            mean
        }
    }
}
