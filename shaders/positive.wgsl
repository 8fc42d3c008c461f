// g of minGRU and minLSTM (Feng et al. 2024), a positive, continuous function: v + 1/2, for v < 0 sigmoid(v).

fn positive(v: f32) -> f32 { return select(v + 0.5, sigmoid_f32(v), v < 0.0); }

// The slope where it has the value g.
fn positive_slope(g: f32) -> f32 { return select(1.0, g * (1.0 - g), g < 0.5); }
