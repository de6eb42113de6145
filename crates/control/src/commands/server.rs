//! The NBD server: started, and stopped with its exports.

use std::rc::Rc;
use std::time::Duration;

use dolmen_exports::{NBD, NbdServer, NbdServerConfig, Server as _, StopMode};
use dolmen_qmp::schema::{Field, NOTHING, SOCKET_ADDRESS_LEGACY, Shape, Ty};
use dolmen_qmp::{QmpError, SocketAddress};
use dolmen_rt::{Addr, LocalFuture};
use dolmen_types::{Error, ErrorKind, OpId, Options, Value};
use serde_json::json;

use crate::act::{Act, Proposal, Wait};
use crate::export::{Export, clients_gone};
use crate::guard::Guard;
use crate::row::CommandRow;
use crate::turns::Scope;
use crate::world::{Answer, Done, Gone, World};

/// Clients that connect to the NBD server at one time, unless said otherwise.
const MAX_CONNECTIONS: u32 = 100;

/// How long the negotiation of an NBD client may take, unless said otherwise.
const HANDSHAKE_SECONDS: u64 = 10;

/// What commands about the server have in common. No node has such a name.
const SERVER: &str = "\0server";

/// How the server is to run.
struct Start {
    address: SocketAddress,
    /// Clients at one time; 0 for no limit.
    max_connections: u32,
    /// The longest negotiation; zero for no limit.
    handshake_max: Duration,
    /// Where it is to listen, once that is found out.
    listen: Option<Addr>,
}

impl Start {
    fn from_options(mut o: Options) -> Result<Start, QmpError> {
        let address = SocketAddress::from_value(o.take("addr").unwrap_or(Value::Null))?;
        let max_connections = match o.take_size("max-connections")? {
            None => MAX_CONNECTIONS,
            Some(n) => u32::try_from(n).map_err(|_| out_of_range("max-connections"))?,
        };
        let seconds = o.take_size("handshake-max-seconds")?.unwrap_or(HANDSHAKE_SECONDS);
        if seconds > u32::MAX.into() {
            return Err(out_of_range("handshake-max-seconds").into());
        }
        o.finish("nbd-server-start")?;
        let handshake_max = Duration::from_secs(seconds);
        Ok(Start { address, max_connections, handshake_max, listen: None })
    }
}

fn out_of_range(name: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("Parameter '{name}' is too large"))
}

impl Act for Start {
    fn wait(&self, _: &World) -> Wait {
        Wait::For(Scope::names([SERVER]))
    }

    fn propose<'a>(&'a mut self, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move {
            if p.world.servers.get::<NbdServer>().is_some() {
                return Err(QmpError::generic("NBD server already running"));
            }
            let address = match &self.address {
                SocketAddress::Unix { path } => Addr::Unix(dolmen_types::os_name(path).into()),
                SocketAddress::Inet { host, port } => {
                    let port = port.parse().map_err(|_| {
                        let text = format!("Parameter 'port' expects a number up to 65535, not '{port}'");
                        QmpError::generic(text)
                    })?;
                    Addr::Inet { host: host.clone(), port }
                }
            };
            // A name may take long to resolve.
            NbdServer::check(&p.world.rt, &address).await?;
            self.listen = Some(address);
            Ok(())
        })
    }

    fn perform(self: Box<Self>, world: Rc<World>, _: Option<Guard>) -> LocalFuture<'static, Answer> {
        Box::pin(async move {
            let Some(address) = self.listen else { return Ok(json!({})) };
            let config =
                NbdServerConfig { max_connections: self.max_connections, handshake_max: self.handshake_max };
            let listen = async { Ok(NbdServer::listen(&world.rt, &address, config).await?) };
            let server = world.patiently(listen).await?;
            world.servers.add(Rc::new(server));
            Ok(json!({}))
        })
    }
}

/// Disconnects all clients and stops the server. Answers when that is done, or soon if clients don't go.
struct Stop;

fn of_server(export: &Export) -> bool {
    std::ptr::eq(export.kind, &NBD)
}

impl Act for Stop {
    fn wait(&self, world: &World) -> Wait {
        Wait::For(Scope::names(world.exports.borrow().iter().filter(|e| of_server(e)).map(|e| e.id.clone())))
    }

    fn propose<'a>(&'a mut self, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move {
            if p.world.servers.get::<NbdServer>().is_none() {
                return Err(QmpError::generic("NBD server not running"));
            }
            let exports = p.world.exports.borrow();
            let ids: Vec<OpId> = exports.iter().filter(|e| of_server(e)).map(|e| e.id.clone()).collect();
            drop(exports);
            let draft = p.draft();
            ids.iter().for_each(|id| draft.remove_op(id));
            draft.sweep();
            Ok(())
        })
    }

    fn perform(self: Box<Self>, world: Rc<World>, _: Option<Guard>) -> LocalFuture<'static, Answer> {
        let Some(server) = world.servers.take::<NbdServer>() else {
            return Box::pin(async { Ok(json!({})) });
        };
        let mut exports = world.exports.borrow_mut();
        let mut ids = Vec::new();
        let mut waits = vec![server.stop()];
        for export in exports.iter_mut().filter(|e| of_server(e)) {
            export.shutting_down = true;
            ids.push(export.id.clone());
            // One that is being removed already is waited for as well.
            waits.extend(export.serving.stop(StopMode::Hard));
        }
        drop(exports);
        let (reply, done) = async_channel::bounded(1);
        let gone = world.gone.clone();
        world.rt.spawn(async move {
            for drained in waits {
                drained.await;
            }
            drop(server);
            // The task ends only with the program.
            let _ = gone.send(Gone { ids, reply }).await;
        });
        Box::pin(clients_gone(world.rt.clone(), done))
    }
}

static START: Shape = Shape::of(&[
    Field::optional("handshake-max-seconds", Ty::Int),
    Field::optional("max-connections", Ty::Int),
    Field::required("addr", Ty::Object(&SOCKET_ADDRESS_LEGACY)),
]);

pub(crate) const ROWS: &[CommandRow] = &[
    CommandRow::change(
        "nbd-server-start",
        Ty::Object(&START),
        |_, o| Ok(Box::new(Start::from_options(o)?)),
        "Starts the NBD server.",
    ),
    CommandRow::verb(
        "nbd-server-stop",
        NOTHING,
        |_, _| Ok(Box::new(Stop)),
        "Stops the NBD server and removes its exports.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_the_server() {
        let addr = Value::Map(vec![("type".into(), "unix".into()), ("path".into(), "/x".into())]);
        let o = Options::new().with("addr", addr);
        let start = Start::from_options(o.clone()).expect("reads");
        assert_eq!(start.max_connections, MAX_CONNECTIONS);
        assert_eq!(start.handshake_max, Duration::from_secs(HANDSHAKE_SECONDS));
        assert!(Start::from_options(o.with("max-connections", 1u64 << 32)).is_err());
    }
}
