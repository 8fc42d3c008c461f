//! The harness notices what it says that it notices: small shaders with one fault each, beside one without.

use std::sync::{Arc, Mutex};

use wgpu::util::DeviceExt;

use crate::device;
use crate::msl::{Compiler, Options};

/// Lanes of a workgroup, and words of the buffer for each of its two workgroups.
const LANES: usize = 64;

/// Each lane hands the number of its place to its neighbour through workgroup memory.
const ROTATE: &str = "
    @group(0) @binding(0) var<storage, read_write> words: array<u32>;
    var<workgroup> shared_words: array<u32, 64>;
    @compute @workgroup_size(64)
    fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
        shared_words[lane] = lane;
        workgroupBarrier();
        words[group.x * 64u + lane] = shared_words[(lane + 1u) % 64u];
    }";

/// What two workgroups of a shader leave in a buffer of 128 words, and the error if one is reported.
fn run(source: &str, simd: u32, is_checked: bool) -> (Vec<u32>, Option<String>) {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../target/backends/metal-faults").into();
    let compiler = Compiler::find().expect("a C++ compiler");
    let (_, device, queue) = device::open(Options { compiler, folder, simd, resident: 2, seed: 1, fast_math: false });
    let error = Arc::new(Mutex::new(None));
    let told = error.clone();
    device.on_uncaptured_error(Arc::new(move |error| {
        told.lock().expect("no panic before").get_or_insert(error.to_string());
    }));
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::MAP_READ;
    let contents = [0u8; 2 * LANES * 4];
    let buffer = device.create_buffer_init(&wgpu::util::BufferInitDescriptor { label: None, contents: &contents, usage });
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: None,
        entries: &[wgpu::BindGroupLayoutEntry {
            binding: 0,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Storage { read_only: false },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        }],
    });
    let source = wgpu::ShaderModuleDescriptor { label: None, source: wgpu::ShaderSource::Wgsl(source.into()) };
    let checks = if is_checked { wgpu::ShaderRuntimeChecks::checked() } else { wgpu::ShaderRuntimeChecks::unchecked() };
    // SAFETY: the harness checks all indices.
    let module = unsafe { device.create_shader_module_trusted(source, checks) };
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some("fault"),
        layout: Some(&device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            bind_group_layouts: &[Some(&layout)],
            ..Default::default()
        })),
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions { zero_initialize_workgroup_memory: false, ..Default::default() },
        cache: None,
    });
    let entries = &[wgpu::BindGroupEntry { binding: 0, resource: buffer.as_entire_binding() }];
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout: &layout, entries });
    let mut encoder = device.create_command_encoder(&Default::default());
    let mut pass = encoder.begin_compute_pass(&Default::default());
    pass.set_pipeline(&pipeline);
    pass.set_bind_group(0, &group, &[]);
    pass.dispatch_workgroups(2, 1, 1);
    drop(pass);
    queue.submit([encoder.finish()]);
    buffer.map_async(wgpu::MapMode::Read, .., |_| ());
    let bytes = buffer.get_mapped_range(..).expect("it is mapped").to_vec();
    let words = bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect();
    let error = error.lock().expect("no panic before").take();
    (words, error)
}

fn edited(from: &str, to: &str) -> String {
    assert_eq!(ROTATE.matches(from).count(), 1, "{from}");
    ROTATE.replace(from, to)
}

/// The words of a shader that must run.
fn words_of(source: &str, simd: u32, is_checked: bool) -> Vec<u32> {
    let (words, error) = run(source, simd, is_checked);
    assert_eq!(error, None);
    words
}

/// Twice, a word for each lane.
fn each(word: impl Fn(u32) -> u32) -> Vec<u32> {
    (0..2 * LANES as u32).map(|lane| word(lane % LANES as u32)).collect()
}

#[test]
fn a_sound_shader_runs() {
    for is_checked in [false, true] {
        assert_eq!(words_of(ROTATE, 32, is_checked), each(|lane| (lane + 1) % 64));
    }
}

#[test]
fn a_dropped_barrier_shows() {
    assert_ne!(words_of(&edited("workgroupBarrier();", ""), 32, false), each(|lane| (lane + 1) % 64));
}

#[test]
fn a_barrier_that_is_not_uniform_is_an_error() {
    // Of threads that end before it, and of threads at another. naga takes the word for one that all lanes see alike.
    for (barrier, what) in [
        ("shared_words[0] = lane; if shared_words[0] < 32u { workgroupBarrier(); }", "others have ended"),
        (
            "shared_words[0] = lane; if shared_words[0] < 32u { workgroupBarrier(); } else { workgroupBarrier(); }",
            "wait at lines",
        ),
    ] {
        let error = run(&edited("workgroupBarrier();", barrier), 32, false).1;
        assert!(error.as_ref().is_some_and(|error| error.contains("not uniform") && error.contains(what)), "{error:?}");
    }
}

#[test]
fn memory_of_a_workgroup_is_not_zero_at_first() {
    assert_eq!(words_of(&edited("shared_words[lane] = lane;", ""), 32, false), each(|_| 0x7fff_7fff));
}

#[test]
fn indices_are_checked() {
    for (from, to) in [("words[group.x * 64u", "words[group.x * 65u"), ("shared_words[lane] =", "shared_words[lane + 1u] =")] {
        let error = run(&edited(from, to), 32, false).1;
        assert!(error.as_ref().is_some_and(|error| error.contains("of an array of")), "{error:?}");
        // naga's own checks keep to the array, by the sizes that the host binds.
        assert_eq!(run(&edited(from, to), 32, true).1, None);
    }
}

#[test]
fn lengths_of_arrays_are_bound() {
    assert_eq!(words_of(&edited("= lane;", "= arrayLength(&words);"), 32, false), each(|_| 128));
}

#[test]
fn lanes_of_a_subgroup_exchange() {
    for (value, word) in [
        ("subgroupBroadcast(lane, 3u)", (|lane, simd| lane / simd * simd + 3) as fn(u32, u32) -> u32),
        ("subgroupExclusiveAdd(2u)", |lane, simd| 2 * (lane % simd)),
        ("subgroupAdd(1u)", |_, simd| simd),
    ] {
        for simd in [8, 32] {
            let source = edited("shared_words[(lane + 1u) % 64u]", value);
            assert_eq!(words_of(&source, simd, false), each(|lane| word(lane, simd)), "{value} of {simd}");
        }
    }
}
