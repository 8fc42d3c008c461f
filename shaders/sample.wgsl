// The next token of every row, chosen on the device: a decode loop reads nothing back before its end.
//
// Greedy: the first maximum. Sampling: the Gumbel-max trick (Gumbel, "Statistical Theory of Extreme Values", 1954; Maddison,
// Tarlow, Minka, "A* Sampling", NeurIPS 2014): z / temperature + g with independent g ~ Gumbel(0, 1) is largest at token v with
// probability softmax(z / temperature)[v], so that nothing is sorted or summed. Top-k (Fan, Lewis, Dauphin, "Hierarchical
// Neural Story Generation", ACL 2018): only the k largest logits take part; of equal ones the lower id.
//
// The noise is a function of the key and the place (step, row, token) alone. Logits are compared as integers in the same order:
// exact, on devices too that take infinities for absent. A logit of -inf is never drawn beside a finite one; where the largest
// is infinite, its first place is chosen. NaN anywhere in a row stops the row, with a mark that the host reports.

struct Sample {
    rows: u32,
    vocabulary: u32,
    step: u32,     // tokens go to row `step` of ids
    sampling: u32, // 0: greedy
    top_k: u32,    // at least the vocabulary: all tokens take part
    pad: u32,      // what a stopped row emits
    end: u32,      // the token that stops a row; 2^32 - 1: none
    temperature: f32,
    inverse: f32,  // 1 / temperature
    key0: u32,
    key1: u32,
}

@group(0) @binding(0) var<uniform> params: Sample;
// Of f32: nothing may look at a NaN but as bits.
@group(0) @binding(1) var<storage, read> logits: array<u32>;
@group(0) @binding(2) var<storage, read_write> ids: array<u32>; // [steps, rows]
@group(0) @binding(3) var<storage, read_write> last: array<u32>; // [rows]: row `step` of ids
@group(0) @binding(4) var<storage, read_write> stopped: array<u32>; // [rows]: RUNNING, ENDED or NOT_A_NUMBER
@group(0) @binding(5) var<storage, read_write> lengths: array<u32>; // [rows]: tokens emitted, the end counted, padding not

const RUNNING = 0u;
const ENDED = 1u;
const NOT_A_NUMBER = 2u;

const LANES = 64u;
// Images of -inf, inf and NaN.
const LOWEST = 0x00800000u;
const HIGHEST = 0xff800000u;
const NAN_IMAGE = 0xffffffffu;
// A token this many temperatures below the largest cannot win: g lies between -3.2 and 22.9.
const REACH = 32.0;

var<workgroup> state: u32;
var<workgroup> best: array<vec2<u32>, LANES>;
var<workgroup> bins: array<atomic<u32>, 16>;

@compute @workgroup_size(LANES)
fn sample(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // What decides over barriers is read before all loops: what a loop reads, and lanes leave at different times, differs from lane to
    // lane for FXC, and barriers must not depend on it.
    let last_id = params.vocabulary - 1u;
    let draws = params.sampling == 1u;
    let from_top = params.top_k <= last_id;
    for (var row = group.x; row < params.rows; row += groups.x) {
        if lane == 0u { state = stopped[row]; }
        // The same value in every lane, known to the compiler: barriers may follow.
        if workgroupUniformLoad(&state) != RUNNING {
            if lane == 0u { emit(row, params.pad); }
            continue;
        }
        let first = row * params.vocabulary;

        // Pairs (image, last id - id): the larger logit wins, of equal ones the lower id.
        var top = vec2(0u);
        for (var v = lane; v < params.vocabulary; v += LANES) { top = larger(top, vec2(image(logits[first + v]), reversed(v))); }
        top = largest(lane, top);
        var chosen = top;
        if draws && top.x > LOWEST && top.x < HIGHEST {
            var least = vec2(0u);
            if from_top { least = kth_largest(first, lane, last_id); }
            let highest = bitcast<f32>(logits[first + reversed(top.y)]);
            least.x = max(least.x, image(bitcast<u32>(highest - REACH * params.temperature)));

            chosen = vec2(0u);
            for (var v = lane; v < params.vocabulary; v += LANES) {
                let pair = vec2(image(logits[first + v]), reversed(v));
                if is_less(pair, least) { continue; }
                let z = bitcast<f32>(logits[first + v]);
                let score = (z - highest) * params.inverse + gumbel(row, v);
                chosen = larger(chosen, vec2(image(bitcast<u32>(score)), pair.y));
            }
            chosen = largest(lane, chosen);
        }

        if lane == 0u {
            if top.x == NAN_IMAGE {
                stopped[row] = NOT_A_NUMBER;
                emit(row, params.pad);
            } else {
                let token = reversed(chosen.y);
                lengths[row] += 1u;
                stopped[row] = select(RUNNING, ENDED, token == params.end);
                emit(row, token);
            }
        }
    }
}

fn emit(row: u32, token: u32) {
    ids[params.step * params.rows + row] = token;
    last[row] = token;
}

// An integer for the bits of a number, in the order of the numbers: both zeros the same, every NaN the largest.
fn image(bits: u32) -> u32 {
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u { return NAN_IMAGE; }
    if bits != magnitude { return 0x80000000u - magnitude; }
    return bits + 0x80000000u;
}

// An id from the other end, and back.
fn reversed(id: u32) -> u32 {
    return params.vocabulary - 1u - id;
}

fn is_less(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.x < b.x || (a.x == b.x && a.y < b.y);
}

fn larger(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return select(a, b, is_less(a, b));
}

// Of all lanes' pairs; every lane gets it.
fn largest(lane: u32, pair: vec2<u32>) -> vec2<u32> {
    best[lane] = pair; // all have read the last result: see the end
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half { best[lane] = larger(best[lane], best[lane + half]); }
    }
    return workgroupUniformLoad(&best[0]); // between two barriers
}

// The pair at place k of the row's pairs, the largest first: digit by digit, each time counting the pairs that begin with
// the digits found so far by their next one. Sums of integers: no order of the lanes changes them.
fn kth_largest(first: u32, lane: u32, last_id: u32) -> vec2<u32> {
    var place = params.top_k; // among the pairs that begin so
    var found = vec2(0u);
    for (var digit = 0u; digit < 16u; digit++) {
        let shift = 28u - 4u * (digit % 8u);
        let in_id = digit >= 8u;
        // Ids have no more digits than the largest.
        if in_id && last_id >> shift == 0u { continue; }
        workgroupBarrier(); // the last counts were read by all
        if lane < 16u { atomicStore(&bins[lane], 0u); }
        workgroupBarrier();
        for (var v = lane; v < params.vocabulary; v += LANES) {
            let pair = vec2(image(logits[first + v]), reversed(v));
            // Shifting by 32 bits is not defined: by 4 and the rest.
            let begins = select((pair.x >> 4u) >> shift == (found.x >> 4u) >> shift,
                pair.x == found.x && (pair.y >> 4u) >> shift == (found.y >> 4u) >> shift, in_id);
            if begins { atomicAdd(&bins[(select(pair.x, pair.y, in_id) >> shift) & 15u], 1u); }
        }
        workgroupBarrier();
        var value = 15u;
        for (; value > 0u; value--) {
            let count = atomicLoad(&bins[value]);
            if count >= place { break; }
            place -= count;
        }
        found |= select(vec2(value << shift, 0u), vec2(0u, value << shift), in_id);
    }
    return found;
}

// -log(-log(u)) for a u that lies evenly between 0 and 1.
fn gumbel(row: u32, token: u32) -> f32 {
    const UNIT = 1.0 / 4294967296.0;
    const DOMAIN = 0x73616d70u; // "samp": other draws of the same key are other draws
    let bits = philox(vec2(params.key0, params.key1), vec4(token, row, params.step, DOMAIN)).x;
    // The winners are those whose u is close to 1: from the other end, where numbers are dense. -log(1 - x) is a sum there.
    let x = (f32(bits) + 0.5) * UNIT;
    let near = x * (1.0 + x * (0.5 + x * (0.33333334 + x * (0.25 + x * (0.2 + x * 0.16666667)))));
    let far = -log_f32((f32(~bits) + 0.5) * UNIT);
    return -log_f32(select(far, near, x < 0.0625));
}
