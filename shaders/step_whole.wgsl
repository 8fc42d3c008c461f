// A step in one launch: the product of all gates with h, then the cell. For sweep_step.wgsl and step_from_h.wgsl.

const SUMS = GATES;
const FIRST = 0u;
const ALL = GATES;

fn step_forward(row: u32, unit: u32, r: Sums, p: Unit) { run_cell(row, unit, r, p); }
