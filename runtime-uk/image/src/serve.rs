//! The loop of a serving image: packets in, one step of work, packets out, and sleep when there is nothing to do.

use core::error::Error;

use alloc::boxed::Box;
use alloc::vec::Vec;

use engine::Context;
use uk_kernel::devices::Devices;
use uk_kernel::machine::Machine;
use uk_kernel::net::{Network, Service};
use uk_kernel::{clock, say};

/// Serves until the machine is switched off.
pub fn serve(machine: &Machine, devices: &mut Devices, context: Context) -> Result<(), Box<dyn Error>> {
    let Some(card) = devices.network.pop() else {
        say!("no network card: nothing to serve");
        return Ok(());
    };
    let mut network = Network::new(card, machine.options.address, machine.options.port)?;
    say!("listening on port {} after {} ms", machine.options.port, clock::now().as_millis());
    let mut server = Server::new(context);
    loop {
        if !network.poll(&mut server) {
            machine.sleep(network.next_poll(), || false);
        }
    }
}

/// A request line longer than this is refused.
const MAX_HEAD_BYTES: usize = 8 << 10;

/// One connection: a request comes in, an answer goes out, and it ends.
#[derive(Default)]
struct Connection {
    head: Vec<u8>,
    answer: Vec<u8>,
    sent: usize,
    answered: bool,
}

/// Says that the machine is up.
struct Server {
    context: Context,
    connections: Vec<Connection>,
}

impl Server {
    fn new(context: Context) -> Server {
        Server { context, connections: Vec::new() }
    }

    fn answer(&self, head: &[u8]) -> Vec<u8> {
        let health = head.starts_with(b"GET /health ");
        let (status, body) = if health {
            let name = self.context.model().arch_name();
            ("200 OK", alloc::format!("{{\"status\":\"ok\",\"arch\":\"{name}\"}}\n"))
        } else {
            (
                "404 Not Found",
                alloc::string::String::from("{\"error\":{\"message\":\"no such path\",\"code\":404}}\n"),
            )
        };
        alloc::format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
        .into_bytes()
    }
}

impl Service for Server {
    fn open(&mut self, connection: usize) {
        if self.connections.len() <= connection {
            self.connections.resize_with(connection + 1, Connection::default);
        }
        self.connections[connection] = Connection::default();
    }

    fn receive(&mut self, connection: usize, bytes: &[u8]) -> usize {
        let one = &mut self.connections[connection];
        if !one.answered {
            one.head.extend_from_slice(bytes);
            if one.head.windows(4).any(|end| end == b"\r\n\r\n") || one.head.len() > MAX_HEAD_BYTES {
                let head = core::mem::take(&mut one.head);
                let answer = self.answer(&head);
                let one = &mut self.connections[connection];
                (one.answer, one.answered) = (answer, true);
            }
        }
        bytes.len()
    }

    fn end_of_input(&mut self, connection: usize) {
        self.connections[connection].answered = true;
    }

    fn transmit(&mut self, connection: usize, room: &mut [u8]) -> usize {
        let one = &mut self.connections[connection];
        let rest = &one.answer[one.sent..];
        let n = rest.len().min(room.len());
        room[..n].copy_from_slice(&rest[..n]);
        one.sent += n;
        n
    }

    fn finished(&self, connection: usize) -> bool {
        let one = &self.connections[connection];
        one.answered && one.sent == one.answer.len()
    }

    fn closed(&mut self, connection: usize) {
        self.connections[connection] = Connection::default();
    }
}
