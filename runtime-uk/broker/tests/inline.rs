//! A guest without shared memory: everything on the link.

mod common;

use common::{count, inline, of_another_build, run_cases};
use gpu_kernels::driver::{Driver, DriverError, EventId, MemKind, ModuleId, StreamId};
use gpu_kernels::launch::{DevicePtr, Launch, Params};
use uk_broker::Limits;

const STREAM: StreamId = StreamId::DEFAULT;

#[test]
fn a_broker_of_another_build_is_refused() {
    let (driver, broker) = of_another_build();
    let error = driver.err().unwrap().to_string();
    assert!(error.contains("must be built from the same source"), "{error}");
    broker.end().unwrap();
}

/// Kernels give what they give on the emulator itself, whatever the pieces in which bytes come.
#[test]
fn kernels_run() {
    for most in [4096, 7] {
        let (driver, broker) = inline(most, Limits::default());
        assert_eq!(driver.info().name, "emulator");
        run_cases(&driver, "rms_norm", 2);
        run_cases(&driver, "elementwise", 2);
        assert!(count(&broker.metrics.launches) >= 4);
        assert_eq!(count(&broker.metrics.failures), 0);
        drop(driver);
        broker.end().unwrap();
    }
}

/// Copies longer than staging memory, at odd places.
#[test]
fn long_copies() {
    let (driver, broker) = inline(1 << 20, Limits::default());
    let data: Vec<u8> =
        (0..(5 << 20) + 13).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let at = driver.alloc(MemKind::Device, data.len() as u64 + 100).unwrap();
    driver.write(at.offset(3), &data, STREAM).unwrap();
    let mut back = vec![0; data.len()];
    driver.read(&mut back, at.offset(3), STREAM).unwrap();
    assert!(back == data);
    driver.free(at).unwrap();
    driver.synchronise(STREAM).unwrap();
    assert_eq!(count(&broker.metrics.allocated_bytes), 0);
    drop(driver);
    broker.end().unwrap();
}

/// A step on a captured graph is one doorbell.
#[test]
fn a_graph_is_one_doorbell() {
    let (driver, broker) = inline(4096, Limits::default());
    let (a, b) = (driver.alloc(MemKind::Device, 4096).unwrap(), driver.alloc(MemKind::Device, 4096).unwrap());
    let stream = driver.create_stream().unwrap();
    driver.begin_capture(stream).unwrap();
    driver.copy(b, a, 4096, stream).unwrap();
    driver.fill(a, 7, 16, stream).unwrap();
    let graph = driver.end_capture(stream).unwrap();
    let before = count(&broker.metrics.submissions);
    driver.write(a, &[3; 4096], stream).unwrap();
    driver.launch_graph(graph, stream).unwrap();
    let mut back = [0; 4096];
    driver.read(&mut back, b, stream).unwrap();
    assert_eq!(count(&broker.metrics.submissions) - before, 1);
    assert_eq!(back, [3; 4096]);
    driver.release_graph(graph).unwrap();
    driver.release_stream(stream).unwrap();
    driver.synchronise(STREAM).unwrap();
    drop(driver);
    broker.end().unwrap();
}

/// Each refusal is a typed error with the broker's words, and the session goes on.
#[test]
fn what_is_not_the_guests_is_refused() {
    let limits = Limits { memory_bytes: 1 << 20, host_bytes: 1 << 16, allocations: 2, handles: 2 };
    let (driver, broker) = inline(4096, limits);
    let at = driver.alloc(MemKind::Device, 256).unwrap();
    let address = |result: Result<(), DriverError>| {
        assert!(matches!(result, Err(DriverError::Address { .. })), "{result:?}");
    };
    let mut byte = [0];
    // Past the end, before the start, across the end, around the end of the address space, and this program's own.
    let own = (&raw const byte).expose_provenance() as u64;
    for wrong in [at.0 + 256, at.0 - 1, u64::MAX, 0, own] {
        address(driver.read(&mut byte, DevicePtr(wrong), STREAM));
    }
    address(driver.read(&mut [0; 2], DevicePtr(at.0 + 255), STREAM));
    driver.copy(DevicePtr(own), at, 1, STREAM).unwrap();
    address(driver.synchronise(STREAM));
    driver.fill(at, 1, u64::MAX, STREAM).unwrap();
    address(driver.synchronise(STREAM));
    driver.free(DevicePtr(at.0 + 1)).unwrap();
    address(driver.synchronise(STREAM));

    let error = driver.alloc(MemKind::Device, 1 << 20).unwrap_err();
    assert_eq!(error, DriverError::OutOfMemory { kind: MemKind::Device, bytes: 1 << 20 });
    // Of the host's memory the guest may have less.
    for kind in [MemKind::Host, MemKind::Managed] {
        let error = driver.alloc(kind, (1 << 16) + 1).unwrap_err();
        assert_eq!(error, DriverError::OutOfMemory { kind, bytes: (1 << 16) + 1 });
    }
    let host = driver.alloc(MemKind::Host, 1 << 16).unwrap();
    driver.free(host).unwrap();
    driver.alloc(MemKind::Host, 1 << 16).unwrap();
    assert!(matches!(driver.alloc(MemKind::Host, 1), Err(DriverError::OutOfMemory { .. })));
    driver.create_stream().unwrap();
    driver.record(STREAM).unwrap();
    assert!(matches!(driver.record(STREAM), Err(DriverError::Driver { .. })));
    assert!(matches!(driver.is_done(EventId(77)), Err(DriverError::Handle { .. })));

    let launch =
        |entry| Launch { entry, grid: [1; 3], cta: 32, cluster: 1, smem_bytes: 0, params: Params::new() };
    let error = driver.launch(ModuleId(0), &launch("rm -rf"), STREAM).unwrap_err();
    assert_eq!(error, DriverError::NoKernel { entry: "no loaded module has a kernel rm -rf".into() });
    assert!(driver.launch(ModuleId(1), &launch("rms_norm_f32"), STREAM).is_err());
    // It still works.
    driver.write(at, &[5; 256], STREAM).unwrap();
    driver.read(&mut byte, at.offset(255), STREAM).unwrap();
    assert_eq!(byte, [5]);
    drop(driver);
    broker.end().unwrap();
}

/// A kernel with the wrong arguments fails when it is waited for, with the emulator's words.
#[test]
fn a_kernels_failure_is_reported() {
    let (driver, broker) = inline(4096, Limits::default());
    let entry = gpu_kernels::registry::find("rms_norm").unwrap().entries()[0][0].name;
    let launch = Launch { entry, grid: [1; 3], cta: 32, cluster: 1, smem_bytes: 0, params: Params::new() };
    driver.launch(ModuleId(0), &launch, STREAM).unwrap();
    let error = driver.synchronise(STREAM).unwrap_err();
    assert!(error.to_string().contains(entry), "{error}");
    driver.synchronise(STREAM).unwrap();
    drop(driver);
    broker.end().unwrap();
}
