//! Monitors on a listening socket: each client gets a session of its own.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use dolmen_rt::{Addr, Listener, Stream};
use dolmen_types::{Error, ErrorKind, Result};

use crate::handle::Control;
use crate::monitor::serve_monitor;
use crate::outgoing::MonitorOptions;

/// Pause after a failed accept: out of descriptors is over when a client leaves.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket that listens for monitor clients. Dropping it removes the socket from the
/// file system.
pub struct MonitorSocket {
    listener: Listener,
    path: PathBuf,
}

/// Listens at a path. A socket that no process listens on is replaced, a live one is not.
///
/// # Errors
/// `Busy` when a process listens there; otherwise the system's.
pub async fn listen_monitor(control: &Control, path: impl Into<PathBuf>) -> Result<MonitorSocket> {
    let path = path.into();
    let Some(io) = control.rt().io() else {
        return Err(Error::new(ErrorKind::Unsupported, "this runtime has no sockets"));
    };
    let listener = io.listen(&Addr::Unix(path.clone())).await?;
    Ok(MonitorSocket { listener, path })
}

impl MonitorSocket {
    /// Waits for one client.
    ///
    /// # Errors
    /// The system's.
    pub async fn accept(&self) -> Result<Stream> {
        self.listener.accept().await
    }

    /// Serves clients, many at once, until everything has ended.
    pub async fn serve(self, control: &Control, options: MonitorOptions) {
        let ended = async {
            control.ended().await;
            None
        };
        futures_lite::pin!(ended);
        loop {
            let accepted = async { Some(self.listener.accept().await) };
            match futures_lite::future::or(&mut ended, accepted).await {
                None => return,
                Some(Ok(stream)) => {
                    let inner = control.clone();
                    control.rt().spawn(async move {
                        // A lost connection is the client's affair.
                        let _ = serve_monitor(&inner, stream, options).await;
                    });
                }
                Some(Err(e)) => {
                    control.world().log(&format!("monitor socket {}: {e}", self.path.display()));
                    control.rt().sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl fmt::Debug for MonitorSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MonitorSocket({})", self.path.display())
    }
}
