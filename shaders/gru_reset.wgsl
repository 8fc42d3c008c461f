// A GRU's reset gate before the product (Cho et al. 2014): between the products of r and z and that of n, the step forms what the
// latter sees, r h'. Backward, that product's gradient becomes those of r and h'. See cell_gru.wgsl.

struct GruReset {
    rows: u32,   // B
    hidden: u32, // H
    t: u32,      // this step
    before: u32, // slot of the state before it
}

@group(0) @binding(0) var<uniform> params: GruReset;
@group(0) @binding(1) var<storage, read_write> slots: array<f32>; // [T, B, 4, H]
@group(0) @binding(2) var<storage, read> states: array<f32>;      // [depth, B, H]
@group(0) @binding(3) var<storage, read> products: array<f32>;    // reset: [B, 3, H], gate r
@group(0) @binding(4) var<storage, read> unit_values: array<f32>; // [3, H]: b_hh
@group(0) @binding(5) var<storage, read> dseen: array<f32>;       // reset_backward: [B, H], the gradient of r h'
@group(0) @binding(6) var<storage, read_write> dh: array<f32>;    // reset_backward: [B, H ..]: that of h' grows

override gate_kind: u32 = 0u; // sigmoid
override gate_alpha: f32 = 0.0;
override gate_beta: f32 = 0.0;
override clip: f32 = 0.0; // of each pre-activation; 0: none

const LANES = 64u;
const GATES = 3u;
const SLOTS = 4u;

fn slot_at(at: u32, slot: u32) -> u32 {
    return ((params.t * params.rows + at / params.hidden) * SLOTS + slot) * params.hidden + at % params.hidden;
}

// Slot 3 = r h'. Slot 0 still holds the input part.
@compute @workgroup_size(LANES)
fn reset(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let count = params.rows * params.hidden;
    for (var at = id.x; at < count; at += groups.x * LANES) {
        let unit = at % params.hidden;
        let sum = slots[slot_at(at, 0u)] + (products[at / params.hidden * GATES * params.hidden + unit] + unit_values[unit]);
        let r = activate(gate_kind, gate_alpha, gate_beta, clip_to(clip, sum));
        slots[slot_at(at, 3u)] = r * states[params.before * count + at];
    }
}

// Slot 0, which holds r, becomes the gradient of its pre-activation. All is zero in rows past their end, as dseen is.
@compute @workgroup_size(LANES)
fn reset_backward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let count = params.rows * params.hidden;
    for (var at = id.x; at < count; at += groups.x * LANES) {
        let r = slots[slot_at(at, 0u)];
        let d = dseen[at];
        slots[slot_at(at, 0u)] = d * states[params.before * count + at] * clipped_slope(gate_kind, gate_alpha, gate_beta, clip, r);
        dh[at] += d * r;
    }
}
