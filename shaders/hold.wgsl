// Zoneout (Krueger et al. 2016): a part k of each state is held back, state = k previous + (1 - k) new. In training k is 0 or 1,
// drawn for each step, row, unit and state from a counter; else it is the probability itself.

override zoneout: bool = false;

fn hold_factor(site: Site, state: u32, probability: f32, random: bool) -> f32 {
    if !random { return probability; }
    let bits = philox(vec2(site.key0, site.key1), vec4(site.unit, site.row, site.t, HOLD + state));
    return select(0.0, 1.0, unit_f32(bits.x) < probability);
}

const HOLD = 0x686f6c64u; // tells these draws from others under one key
