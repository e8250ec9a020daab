//! Statistics that a few odd values do not move.

/// Gives the median; of an even number of values, the mean of the two in the middle; of none, 0.
pub(super) fn median(values: &mut [f64]) -> f64 {
    let (is_odd, middle) = (values.len() % 2 == 1, values.len() / 2);
    if values.is_empty() {
        return 0.0;
    }
    let (below, &mut upper, _) = values.select_nth_unstable_by(middle, f64::total_cmp);
    if is_odd {
        return upper;
    }
    let lower = below.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (lower + upper) / 2.0
}

/// Gives the median and the median absolute deviation from it.
pub(super) fn median_and_deviation(values: &mut [f64]) -> (f64, f64) {
    let middle = median(values);
    values.iter_mut().for_each(|value| *value = (*value - middle).abs());
    (middle, median(values))
}

/// The standard deviation of a normal distribution over the median absolute one.
pub(super) const NORMAL: f64 = 1.4826;
