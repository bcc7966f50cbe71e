//! Finding devices: virtio over PCI, virtio over memory, and virtio-pmem.
//!
//! PCI is asked through ports 0xCF8 and 0xCFC, which every PC has had and VMMs emulate; bus 0 only. MicroVMs name their
//! devices on the command line; QEMU's microvm with ACPI does not, so on a machine without PCI its places are looked at. The transports and queues are virtio-drivers'; this file gives it memory ([`Dma`]) and
//! configuration access. virtio-pmem is read here, because only its place is wanted: the file's bytes are then memory.

use alloc::alloc::{alloc_zeroed, dealloc};
use alloc::vec::Vec;
use core::alloc::Layout;
use core::ptr::NonNull;

use virtio_drivers::transport::mmio::{MmioError, MmioTransport, VirtIOHeader};
use virtio_drivers::transport::pci::bus::{Command, ConfigurationAccess, DeviceFunction, PciRoot};
use virtio_drivers::transport::pci::{PciTransport, virtio_device_type};
use virtio_drivers::transport::{DeviceType, SomeTransport, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

use crate::machine::Machine;
use crate::memory::Range;
use crate::paging::Access;
use crate::{port, say};

/// Memory for virtio: heap, at its own address.
pub struct Dma;

// SAFETY: `dma_alloc` gives zeroed, page-aligned heap memory that nobody else has; addresses are physical; device
// registers were mapped when the device was found.
unsafe impl Hal for Dma {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: the layout has a size: queues have at least a page.
        match NonNull::new(unsafe { alloc_zeroed(pages_layout(pages)) }) {
            Some(at) => (at.as_ptr().expose_provenance() as u64, at),
            // An address of 0 tells virtio-drivers that there is no memory.
            None => (0, NonNull::dangling()),
        }
    }

    unsafe fn dma_dealloc(_at: PhysAddr, virt: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: from `dma_alloc` with the same number of pages, by the trait's contract.
        unsafe { dealloc(virt.as_ptr(), pages_layout(pages)) };
        0
    }

    unsafe fn mmio_phys_to_virt(at: PhysAddr, _size: usize) -> NonNull<u8> {
        let pointer = NonNull::new(core::ptr::with_exposed_provenance_mut(at as usize));
        pointer.expect("a device's registers are not at address 0")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>().expose_provenance() as u64
    }

    unsafe fn unshare(_at: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}

fn pages_layout(pages: usize) -> Layout {
    Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE).expect("queues are small")
}

/// PCI configuration through two ports.
struct Ports;

impl Ports {
    fn select(function: DeviceFunction, register: u8) {
        let address = 1 << 31
            | u32::from(function.bus) << 16
            | u32::from(function.device) << 11
            | u32::from(function.function) << 8
            | u32::from(register & 0xfc);
        // SAFETY: selecting a register has no effect on any device.
        unsafe { port::write_u32(0xcf8, address) };
    }
}

impl ConfigurationAccess for Ports {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        Ports::select(function, register);
        // SAFETY: reading configuration has no effect on memory.
        unsafe { port::read_u32(0xcfc) }
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, data: u32) {
        Ports::select(function, register);
        // SAFETY: only virtio-drivers writes here: command bits, and BARs while it measures them.
        unsafe { port::write_u32(0xcfc, data) };
    }

    unsafe fn unsafe_clone(&self) -> Ports {
        Ports
    }
}

/// The devices of a machine.
#[derive(Default)]
pub struct Devices {
    /// Network cards.
    pub network: Vec<SomeTransport<'static>>,
    /// Disks.
    pub disk: Vec<SomeTransport<'static>>,
    /// Consoles: lines to programs on the host.
    pub console: Vec<SomeTransport<'static>>,
    /// Files of the host, mapped: virtio-pmem.
    pub files: Vec<&'static [u8]>,
}

/// virtio's vendor, and its pmem device (27), as PCI numbers.
const VIRTIO: u16 = 0x1af4;
const PMEM: u16 = 0x1040 + 27;
/// QEMU's hw/i386/microvm: where its virtio devices lie, how many, and how far apart.
const MICROVM_MMIO: u64 = 0xfeb0_0000;
const MICROVM_DEVICES: u64 = 24;
const MMIO_BYTES: u64 = 512;

impl Devices {
    /// Looks everywhere.
    pub fn find(machine: &mut Machine) -> Devices {
        let mut devices = Devices::default();
        let has_pci = devices.find_pci(machine);
        if machine.options.mmio.is_empty() && !has_pci {
            let places =
                (0..MICROVM_DEVICES).map(|i| Range { start: MICROVM_MMIO + i * MMIO_BYTES, len: MMIO_BYTES });
            places.for_each(|place| devices.find_mmio(machine, place));
        }
        machine.options.mmio.clone().into_iter().for_each(|place| devices.find_mmio(machine, place));
        devices
    }

    fn add(&mut self, place: &dyn core::fmt::Display, transport: SomeTransport<'static>) {
        let kind = transport.device_type();
        say!("virtio {kind:?} at {place}");
        match kind {
            DeviceType::Network => self.network.push(transport),
            DeviceType::Block => self.disk.push(transport),
            DeviceType::Console => self.console.push(transport),
            _ => {}
        }
    }

    /// Whether there is a PCI bus.
    fn find_pci(&mut self, machine: &mut Machine) -> bool {
        let mut root = PciRoot::new(Ports);
        let found: Vec<_> = root.enumerate_bus(0).collect();
        let has_pci = !found.is_empty();
        for (function, info) in found.into_iter().filter(|(_, info)| info.vendor_id == VIRTIO) {
            root.set_command(function, Command::IO_SPACE | Command::MEMORY_SPACE | Command::BUS_MASTER);
            for (at, len) in memory_bars(&mut root, function) {
                machine.map(Range { start: at, len }, Access::Device);
            }
            if info.device_id == PMEM {
                self.add_file(&mut root, function, machine);
            } else if virtio_device_type(&info).is_some() {
                match PciTransport::new::<Dma, _>(&mut root, function) {
                    Ok(transport) => self.add(&function, transport.into()),
                    Err(error) => say!("virtio device at {function} cannot be used: {error}"),
                }
            }
        }
        has_pci
    }

    fn find_mmio(&mut self, machine: &mut Machine, place: Range) {
        machine.map(place, Access::Device);
        let Some(header) =
            NonNull::new(core::ptr::with_exposed_provenance_mut::<VirtIOHeader>(place.start as usize))
        else {
            return;
        };
        // SAFETY: a VMM's place for a device, by the command line or QEMU's memory map, which is not RAM; mapped, and
        // this is the only transport on it.
        match unsafe { MmioTransport::new(header, place.len as usize) } {
            Ok(transport) => self.add(&format_args!("{:#x}", place.start), transport.into()),
            // A place without a device.
            Err(MmioError::BadMagic(_) | MmioError::InvalidDeviceID(_)) => {}
            Err(error) => say!("the virtio device at {:#x} cannot be used: {error}", place.start),
        }
    }

    /// virtio 1.2, 5.19: the device's configuration is the start and the size of a range of physical memory.
    fn add_file(&mut self, root: &mut PciRoot<Ports>, function: DeviceFunction, machine: &mut Machine) {
        let Some(at) = device_config(root, function) else {
            say!("virtio-pmem at {function} has no configuration");
            return;
        };
        // SAFETY: within a BAR of the device, mapped above; two aligned 64-bit registers.
        let (start, len) = unsafe {
            let registers = core::ptr::with_exposed_provenance::<u64>(at as usize);
            (registers.read_volatile(), registers.add(1).read_volatile())
        };
        let fits = start.checked_add(len).is_some_and(|end| start >= 1 << 20 && end <= 1 << 47);
        let taken = machine.ram.iter().any(|ram| start < ram.end() && ram.start < start.saturating_add(len));
        if !fits || taken || len == 0 {
            say!("virtio-pmem at {function}: {len} bytes at {start:#x} cannot be used");
            return;
        }
        machine.map(Range { start, len }, Access::Read);
        say!("virtio pmem at {function}: {len} bytes");
        // SAFETY: the device's memory, mapped for reading; the host is trusted not to change the model while it is in
        // use (docs/security.md).
        let bytes = unsafe {
            core::slice::from_raw_parts(core::ptr::with_exposed_provenance(start as usize), len as usize)
        };
        self.files.push(bytes);
    }
}

/// Place and size of the memory BARs of a function.
fn memory_bars(root: &mut PciRoot<Ports>, function: DeviceFunction) -> Vec<(u64, u64)> {
    let bars = root.bars(function).unwrap_or_default();
    let places = bars.into_iter().flatten().filter_map(|bar| bar.memory_address_size());
    places
        .filter(|&(at, len)| at != 0 && len != 0 && at.checked_add(len).is_some_and(|end| end <= 1 << 47))
        .collect()
}

/// Where a function's device-specific configuration lies: virtio 1.2, 4.1.4, capability of type 4.
fn device_config(root: &mut PciRoot<Ports>, function: DeviceFunction) -> Option<u64> {
    const VENDOR: u8 = 9;
    const DEVICE_CONFIG: u8 = 4;
    let is_config = |header: u16| (header >> 8) as u8 == DEVICE_CONFIG;
    let found = root.capabilities(function).find(|c| c.id == VENDOR && is_config(c.private_header))?;
    let bar = Ports.read_word(function, found.offset + 4) as u8;
    let offset = u64::from(Ports.read_word(function, found.offset + 8));
    let length = u64::from(Ports.read_word(function, found.offset + 12));
    let (at, len) = root.bar_info(function, bar).ok()??.memory_address_size()?;
    (at != 0 && at % 8 == 0 && offset % 8 == 0 && length >= 16 && offset + length <= len)
        .then_some(at + offset)
}
