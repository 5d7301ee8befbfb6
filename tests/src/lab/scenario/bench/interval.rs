//! The median, and its confidence interval, by a percentile bootstrap (Efron 1979). The method assumes
//! nothing about the distribution of the figures. That suits a shared machine, where some rounds
//! are far from the others.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Number of samples. The ends of the interval then vary by less than the digits that are shown.
const SAMPLES: usize = 10_000;
/// Seed of the samples. It is fixed, so that the same figures give the same interval.
const SEED: u64 = 0x544c;
/// Share of the samples' medians that lies inside the interval.
const CONFIDENCE: f64 = 0.95;

/// Returns the 95 % confidence interval of the median of the distribution that these figures were
/// drawn from. `None` without figures.
pub(super) fn of_median(figures: &[f64]) -> Option<[f64; 2]> {
    if figures.is_empty() {
        return None;
    }
    let mut random = StdRng::seed_from_u64(SEED);
    let mut sample = vec![0.0; figures.len()];
    let mut medians = Vec::with_capacity(SAMPLES);
    for _ in 0..SAMPLES {
        for place in &mut sample {
            *place = figures[random.random_range(0..figures.len())];
        }
        medians.push(median(&sample));
    }
    medians.sort_by(f64::total_cmp);
    let outside = (1.0 - CONFIDENCE) / 2.0;
    let at = |share: f64| medians[((SAMPLES - 1) as f64 * share).round() as usize];
    Some([at(outside), at(1.0 - outside)])
}

/// Returns the median: the middle figure, or the mean of the two in the middle.
pub(super) fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        len if len % 2 == 1 => sorted[len / 2],
        len => (sorted[len / 2 - 1] + sorted[len / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_that_agree_leave_no_doubt() {
        assert_eq!(of_median(&[0.97; 20]), Some([0.97; 2]));
        assert_eq!(of_median(&[]), None);
        assert_eq!(of_median(&[1.5]), Some([1.5; 2]));
    }

    #[test]
    fn the_interval_surrounds_the_median_and_one_outlier_does_not_move_it() {
        let mut figures: Vec<f64> = (0..21).map(|number| 0.90 + 0.01 * f64::from(number)).collect();
        let [low, high] = of_median(&figures).unwrap();
        assert!(low < 1.0 && 1.0 < high, "{low} to {high}");
        assert!(low > 0.92 && high < 1.08, "narrower than the figures: {low} to {high}");
        figures[20] = 1_000.0;
        assert_eq!(of_median(&figures), Some([low, high]));
        assert_eq!(of_median(&figures), of_median(&figures), "the same seed");
    }

    #[test]
    fn the_interval_holds_the_true_median_about_as_often_as_it_says() {
        let mut random = StdRng::seed_from_u64(7);
        let held = (0..200)
            .filter(|_| {
                // The true median is 1.
                let figures: Vec<f64> = (0..20).map(|_| random.random_range(0.5..1.5)).collect();
                let [low, high] = of_median(&figures).unwrap();
                low <= 1.0 && 1.0 <= high
            })
            .count();
        assert!((180..=198).contains(&held), "{held} of 200");
    }
}
