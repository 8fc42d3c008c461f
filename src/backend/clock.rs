//! The GPU's own clock: timestamp queries around the passes of a submission.

use std::time::Duration;

/// Passes that one set of queries serves: a pass writes when it began and when it ended.
const PASSES: usize = wgpu::QUERY_SET_MAX_QUERIES as usize / 2;

/// When each pass of one submission began and ended.
pub(super) struct Clock {
    /// The kernel and the launches of each pass.
    passes: Vec<(&'static str, usize)>,
    sets: Vec<wgpu::QuerySet>,
    pub resolved: wgpu::Buffer,
}

impl Clock {
    pub fn new(device: &wgpu::Device, passes: Vec<(&'static str, usize)>) -> Self {
        let set = |passes: &[_]| {
            let count = 2 * passes.len() as u32;
            device.create_query_set(&wgpu::QuerySetDescriptor { label: Some("clock"), ty: wgpu::QueryType::Timestamp, count })
        };
        let sets = passes.chunks(PASSES).map(set).collect();
        // No buffer may be empty.
        let size = (2 * passes.len() as u64 * u64::from(wgpu::QUERY_SIZE)).max(8);
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let resolved =
            device.create_buffer(&wgpu::BufferDescriptor { label: Some("clock"), size, usage, mapped_at_creation: false });
        Self { passes, sets, resolved }
    }

    /// What pass number `at` is begun with.
    pub fn writes(&self, at: usize) -> wgpu::ComputePassTimestampWrites<'_> {
        let begin = 2 * (at % PASSES) as u32;
        wgpu::ComputePassTimestampWrites {
            query_set: &self.sets[at / PASSES],
            beginning_of_pass_write_index: Some(begin),
            end_of_pass_write_index: Some(begin + 1),
        }
    }

    /// Gathers what the passes wrote.
    pub fn resolve(&self, encoder: &mut wgpu::CommandEncoder) {
        for (set, (index, passes)) in self.sets.iter().zip(self.passes.chunks(PASSES).enumerate()) {
            let offset = (index * 2 * PASSES) as u64 * u64::from(wgpu::QUERY_SIZE);
            encoder.resolve_query_set(set, 0..2 * passes.len() as u32, &self.resolved, offset);
        }
    }

    /// Kernel, launches and time of each pass, from the bytes of `resolved`; `period`: nanoseconds of a tick.
    pub fn times(&self, bytes: &[u8], period: f32) -> Vec<(&'static str, usize, Duration)> {
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(bytes);
        let time = |ticks: &[u64]| Duration::from_nanos((ticks[1].saturating_sub(ticks[0]) as f64 * f64::from(period)) as u64);
        let passes = self.passes.iter().zip(ticks.chunks_exact(2));
        passes.map(|((kernel, launches), ticks)| (*kernel, *launches, time(ticks))).collect()
    }
}
