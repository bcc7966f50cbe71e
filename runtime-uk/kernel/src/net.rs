//! TCP for a [`Service`]: a virtio network card, smoltcp, and a pool of sockets that listen on one port.
//!
//! Everything is polled by one core. smoltcp has no backlog: each socket that listens takes one connection, and a SYN that
//! finds none listening would be refused. Such a SYN is dropped here instead, so that the peer sends it again in a second
//! and waits for its turn.

use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::time::Duration;

use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{self, Medium};
use smoltcp::socket::{dhcpv4, tcp};
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, HardwareAddress, IpCidr, IpProtocol, Ipv4Address,
    Ipv4Cidr, Ipv4Packet, TcpPacket,
};
use virtio_drivers::device::net::{RxBuffer, VirtIONet};
use virtio_drivers::transport::SomeTransport;

use crate::devices::Dma;
use crate::options::Address;
use crate::{clock, say};

/// Connections at once.
pub const SOCKETS: usize = 64;
/// Requests are small; what does not fit is taken in pieces.
const RECEIVE_BYTES: usize = 16 << 10;
/// A window full of streamed answer.
const SEND_BYTES: usize = 32 << 10;
/// A peer that says nothing for so long, keep-alives included, is gone.
const PEER_TIMEOUT: Duration = Duration::from_secs(60);
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long a peer may take to close its side after ours.
const LINGER: Duration = Duration::from_secs(2);
/// Descriptors of each queue of the card.
const QUEUE: usize = 64;
/// Packets taken between two batches at most: some times what the card holds.
const MAX_PACKETS: usize = 8 * QUEUE;
/// An Ethernet frame with virtio's header.
const FRAME_BYTES: usize = 2048;
const MTU: usize = 1514;

/// What a server does with its connections. Connections are numbers, used again after [`Service::closed`].
pub trait Service {
    /// A peer connected.
    fn open(&mut self, connection: usize);
    /// Bytes came; returns how many are taken now. The rest comes again at the next poll, and is the peer's wait.
    fn receive(&mut self, connection: usize, bytes: &[u8]) -> usize;
    /// The peer sends no more.
    fn end_of_input(&mut self, connection: usize);
    /// Writes bytes for the peer; returns how many.
    fn transmit(&mut self, connection: usize, room: &mut [u8]) -> usize;
    /// Nothing more will be transmitted: close once the peer has it all.
    fn finished(&self, connection: usize) -> bool;
    /// The connection is gone, finished or not.
    fn closed(&mut self, connection: usize);
}

type Card = VirtIONet<Dma, SomeTransport<'static>, QUEUE>;

/// The card as smoltcp sees it.
struct Phy {
    card: RefCell<Card>,
    /// Whether a connection would find a socket.
    listening: bool,
}

struct Received<'a> {
    card: &'a RefCell<Card>,
    buffer: RxBuffer,
}

struct Sending<'a>(&'a RefCell<Card>);

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let result = f(self.buffer.packet());
        // The queue has room: the buffer came from it.
        if let Err(error) = self.card.borrow_mut().recycle_rx_buffer(self.buffer) {
            log::warn!("a receive buffer is lost: {error}");
        }
        result
    }
}

impl phy::TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut card = self.0.borrow_mut();
        let mut buffer = card.new_tx_buffer(len);
        let result = f(buffer.packet_mut());
        if let Err(error) = card.send(buffer) {
            // TCP sends it again.
            log::warn!("a packet is lost: {error}");
        }
        result
    }
}

impl phy::Device for Phy {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Sending<'_>)> {
        loop {
            // No packet, or a broken one, whose buffer virtio-drivers gives back itself.
            let buffer = self.card.borrow_mut().receive().ok()?;
            let received = Received { card: &self.card, buffer };
            if self.listening || !opens_connection(received.buffer.packet()) {
                return Some((received, Sending(&self.card)));
            }
            phy::RxToken::consume(received, |_| ());
        }
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sending<'_>> {
        self.card.get_mut().can_send().then_some(Sending(&self.card))
    }

    fn capabilities(&self) -> phy::DeviceCapabilities {
        let mut capabilities = phy::DeviceCapabilities::default();
        capabilities.max_transmission_unit = MTU;
        capabilities.medium = Medium::Ethernet;
        capabilities
    }
}

/// Whether a frame is TCP's first.
fn opens_connection(frame: &[u8]) -> bool {
    let tcp = || {
        let frame = EthernetFrame::new_checked(frame).ok()?;
        let is_ip = frame.ethertype() == EthernetProtocol::Ipv4;
        let packet = is_ip.then(|| Ipv4Packet::new_checked(frame.payload()).ok()).flatten()?;
        let is_tcp = packet.next_header() == IpProtocol::Tcp;
        let segment = is_tcp.then(|| TcpPacket::new_checked(packet.payload()).ok()).flatten()?;
        Some(segment.syn() && !segment.ack())
    };
    tcp().unwrap_or(false)
}

/// One socket of the pool.
struct Slot {
    handle: SocketHandle,
    /// A connection that the service knows of.
    open: bool,
    /// The service knows that no more comes.
    ended: bool,
    /// When the peer had the end of what we say.
    closed: Option<Duration>,
}

/// A network card with its sockets.
pub struct Network {
    phy: Phy,
    interface: Interface,
    sockets: SocketSet<'static>,
    dhcp: Option<SocketHandle>,
    slots: Vec<Slot>,
    port: u16,
}

fn now() -> Instant {
    Instant::from_micros(clock::now().as_micros() as i64)
}

impl Network {
    /// Sets the card up to listen on a port.
    pub fn new(
        transport: SomeTransport<'static>,
        address: Address,
        port: u16,
    ) -> Result<Network, virtio_drivers::Error> {
        let card = Card::new(transport, FRAME_BYTES)?;
        let mac = HardwareAddress::Ethernet(EthernetAddress(card.mac_address()));
        let mut phy = Phy { card: RefCell::new(card), listening: true };
        let mut config = Config::new(mac);
        // For sequence numbers and ports; the clock's ticks differ from boot to boot.
        config.random_seed = clock::ticks();
        let mut interface = Interface::new(config, &mut phy, now());
        let mut sockets = SocketSet::new(Vec::new());
        let dhcp = match address {
            Address::Dhcp => Some(sockets.add(dhcpv4::Socket::new())),
            Address::Fixed { ip, prefix, gateway } => {
                set_address(&mut interface, Some(Ipv4Cidr::new(ip, prefix)), gateway);
                None
            }
        };
        let slots = (0..SOCKETS).map(|_| {
            let buffer = |bytes| tcp::SocketBuffer::new(vec![0; bytes]);
            let mut socket = tcp::Socket::new(buffer(RECEIVE_BYTES), buffer(SEND_BYTES));
            socket.set_timeout(Some(PEER_TIMEOUT.into()));
            socket.set_keep_alive(Some(KEEP_ALIVE.into()));
            // An answer is streamed token by token: waiting to fill a segment would only delay it.
            socket.set_nagle_enabled(false);
            Slot { handle: sockets.add(socket), open: false, ended: false, closed: None }
        });
        let slots = slots.collect();
        Ok(Network { phy, interface, sockets, dhcp, slots, port })
    }

    /// Moves packets and bytes; true if anything moved.
    pub fn poll(&mut self, service: &mut dyn Service) -> bool {
        let mut busy = self.receive();
        self.poll_dhcp();
        for (connection, slot) in self.slots.iter_mut().enumerate() {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(slot.handle);
            busy |= poll_slot(slot, socket, connection, self.port, service);
        }
        busy |= self.interface.poll_egress(now(), &mut self.phy, &mut self.sockets) != PollResult::None;
        busy
    }

    /// Takes packets that there are, one at a time: each may take the last listening socket. Not without end: who sends
    /// them faster than they are taken would keep the answers from being computed.
    fn receive(&mut self) -> bool {
        self.interface.poll_maintenance(now());
        let mut busy = false;
        for _ in 0..MAX_PACKETS {
            let listens = |slot: &Slot| self.sockets.get::<tcp::Socket<'_>>(slot.handle).is_listening();
            self.phy.listening = self.slots.iter().any(listens);
            match self.interface.poll_ingress_single(now(), &mut self.phy, &mut self.sockets) {
                PollIngressSingleResult::None => break,
                _ => busy = true,
            }
        }
        busy
    }

    /// When there is something to do even if no packet comes.
    pub fn next_poll(&mut self) -> Option<Duration> {
        let delay = self.interface.poll_delay(now(), &self.sockets)?;
        Some(clock::now() + Duration::from_micros(delay.total_micros()))
    }

    fn poll_dhcp(&mut self) {
        let Some(handle) = self.dhcp else { return };
        match self.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll() {
            None => {}
            Some(dhcpv4::Event::Configured(config)) => {
                set_address(&mut self.interface, Some(config.address), config.router);
            }
            Some(dhcpv4::Event::Deconfigured) => set_address(&mut self.interface, None, None),
        }
    }
}

fn set_address(interface: &mut Interface, ours: Option<Ipv4Cidr>, gateway: Option<Ipv4Address>) {
    interface.update_ip_addrs(|addresses| {
        addresses.clear();
        if let Some(ours) = ours {
            // The list was just emptied.
            let _ = addresses.push(IpCidr::Ipv4(ours));
        }
    });
    interface.routes_mut().remove_default_ipv4_route();
    if let Some(gateway) = gateway {
        // Its only route was just removed.
        let _ = interface.routes_mut().add_default_ipv4_route(gateway);
    }
    match (ours, gateway) {
        (Some(ours), Some(gateway)) => say!("address {ours}, gateway {gateway}"),
        (Some(ours), None) => say!("address {ours}"),
        (None, _) => say!("no address: waiting for DHCP"),
    }
}

fn poll_slot(
    slot: &mut Slot,
    socket: &mut tcp::Socket<'_>,
    connection: usize,
    port: u16,
    service: &mut dyn Service,
) -> bool {
    let mut busy = false;
    // Both sides are done; waiting for stray packets would keep the socket from its next connection.
    if socket.state() == tcp::State::TimeWait {
        socket.abort();
    }
    if !socket.is_open() {
        if slot.open {
            service.closed(connection);
            slot.open = false;
        }
        // The socket is closed and the port is not 0.
        let _ = socket.listen(port);
        return busy;
    }
    if !socket.is_active() || matches!(socket.state(), tcp::State::SynReceived) {
        return busy;
    }
    if !slot.open {
        (slot.open, slot.ended, slot.closed) = (true, false, None);
        service.open(connection);
        busy = true;
    }
    while socket.can_recv() {
        let taken = socket.recv(|bytes| {
            let taken = service.receive(connection, bytes);
            (taken, taken)
        });
        match taken {
            Ok(1..) => busy = true,
            _ => break,
        }
    }
    if !socket.may_recv() && !socket.can_recv() && !slot.ended {
        slot.ended = true;
        service.end_of_input(connection);
    }
    while socket.can_send() {
        let sent = socket.send(|room| {
            let sent = service.transmit(connection, room);
            (sent, sent)
        });
        match sent {
            Ok(1..) => busy = true,
            _ => break,
        }
    }
    if service.finished(connection) && socket.may_send() {
        socket.close();
        busy = true;
    }
    // The peer has all that we said, and does not close its side: its socket is wanted for others.
    if socket.state() == tcp::State::FinWait2 {
        let since = *slot.closed.get_or_insert_with(clock::now);
        if clock::now().saturating_sub(since) > LINGER {
            socket.abort();
        }
    }
    busy
}
