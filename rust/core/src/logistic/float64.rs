//! The same in double precision, one number at a time.

/// The logarithm of a mass, and its derivatives.
#[derive(Debug, Clone, Copy)]
pub struct Mass {
    /// In nats.
    pub log: f64,
    /// In the mean.
    pub d_mean: f64,
    /// In the logarithm of the scale.
    pub d_log_scale: f64,
}

/// The level nearest to x, of `top` + 1; NaN for NaN.
pub fn level(x: f64, top: f64) -> f64 {
    ((x + 1.0) * (top / 2.0)).clamp(0.0, top).round_ties_even()
}

/// The mass on `level`, whose ends are `lower` and `upper` half levels from the mean.
pub fn mass(level: f64, top: f64, lower: f64, upper: f64, log_scale: f64) -> Mass {
    // Finite, so that an end at the mean is no 0 times infinity.
    let rate = (-log_scale).exp();
    let rate = if rate > 1e300 { 1e300 } else { rate };
    let scaled = rate / top;
    let (a, b, width) = (upper * scaled, lower * scaled, 2.0 * scaled);
    let mut mass = Mass { log: 0.0, d_mean: 0.0, d_log_scale: 0.0 };
    if level.is_nan() {
        return Mass { log: level, d_mean: level, d_log_scale: level };
    }
    if level < top {
        let slope = sigmoid(-a);
        mass.log -= softplus(-a);
        mass.d_mean -= slope;
        mass.d_log_scale -= if slope == 0.0 { 0.0 } else { a * slope };
    }
    if level > 0.0 {
        let slope = sigmoid(b);
        mass.log -= softplus(b);
        mass.d_mean += slope;
        mass.d_log_scale += if slope == 0.0 { 0.0 } else { b * slope };
    }
    if level > 0.0 && level < top {
        let narrow = width < 1e-8;
        mass.log += if narrow { (2.0 / top).ln() - log_scale - width / 2.0 } else { (-(-width).exp_m1()).ln() };
        mass.d_log_scale -= if narrow { 1.0 - width / 2.0 } else { width / width.exp_m1() };
    }
    mass.d_mean *= rate;
    mass
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    let rest = (-x.abs()).exp();
    (if x > 0.0 { 1.0 } else { rest }) / (1.0 + rest)
}
