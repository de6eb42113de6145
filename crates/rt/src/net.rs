//! Sockets: listeners and streams, Unix and TCP, and standard input and output, behind one [`Stream`].

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dolmen_types::{Error, ErrorKind, ResultExt};

use crate::op::Op;
use crate::sys::Storage;
use crate::{Buf, CoreIo, IoVec, Result, WaitsFor};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// Writing at most this much to a pipe or a terminal that is ready does not block (PIPE_BUF).
const PIPE_CHUNK: usize = 4096;
/// How often we look whether the socket of a dead process is gone, and the pause in between.
const LINGER_TRIES: usize = 200;
const LINGER_PAUSE: std::time::Duration = std::time::Duration::from_millis(10);

/// A connected or listening socket that belongs to no core. Cheap to clone; operations in flight keep it open.
#[derive(Clone)]
pub struct Socket(Arc<OwnedFd>);

impl Socket {
    pub(crate) fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// The socket behind a descriptor, in blocking mode.
    pub fn from_fd(fd: OwnedFd) -> Socket {
        crate::sys::set_nonblocking(fd.as_raw_fd(), false);
        Socket(Arc::new(fd))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Socket(fd {})", self.raw())
    }
}

/// A socket address as the kernel knows it.
#[derive(Clone, Copy)]
pub(crate) struct SockAddr {
    storage: libc::sockaddr_storage,
    len: libc::socklen_t,
}

impl SockAddr {
    /// A number that is the same for the same address.
    pub(crate) fn number(&self) -> u64 {
        use std::hash::{Hash, Hasher};
        let mut hasher = std::hash::DefaultHasher::new();
        let (ptr, len) = self.as_raw();
        // SAFETY: the storage has `len` bytes at least, all of them initialised.
        unsafe { std::slice::from_raw_parts(ptr.cast::<u8>(), len as usize) }.hash(&mut hasher);
        hasher.finish()
    }

    pub(crate) fn as_raw(&self) -> (*const libc::sockaddr, libc::socklen_t) {
        ((&raw const self.storage).cast(), self.len)
    }

    fn family(&self) -> i32 {
        i32::from(self.storage.ss_family)
    }

    fn unix(path: &Path) -> Result<SockAddr> {
        use std::os::unix::ffi::OsStrExt;
        let bytes = path.as_os_str().as_bytes();
        // SAFETY: all-zero is a valid sockaddr_storage.
        let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        // SAFETY: sockaddr_storage is large enough and aligned for every address type.
        let addr = unsafe { &mut *(&raw mut storage).cast::<libc::sockaddr_un>() };
        if bytes.is_empty() || bytes.len() >= addr.sun_path.len() || bytes.contains(&0) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("UNIX socket path '{}' is empty or too long", path.display()),
            )
            .remedy(format!("use a path of at most {} bytes", addr.sun_path.len() - 1)));
        }
        addr.sun_family = libc::AF_UNIX as libc::sa_family_t;
        for (to, from) in addr.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        let len = std::mem::offset_of!(libc::sockaddr_un, sun_path) + bytes.len() + 1;
        Ok(SockAddr { storage, len: len as libc::socklen_t })
    }

    fn inet(addr: std::net::SocketAddr) -> SockAddr {
        // SAFETY: as above.
        let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        let len = match addr {
            std::net::SocketAddr::V4(a) => {
                // SAFETY: as above.
                let s = unsafe { &mut *(&raw mut storage).cast::<libc::sockaddr_in>() };
                s.sin_family = libc::AF_INET as libc::sa_family_t;
                s.sin_port = a.port().to_be();
                s.sin_addr.s_addr = u32::from_ne_bytes(a.ip().octets());
                size_of::<libc::sockaddr_in>()
            }
            std::net::SocketAddr::V6(a) => {
                // SAFETY: as above.
                let s = unsafe { &mut *(&raw mut storage).cast::<libc::sockaddr_in6>() };
                s.sin6_family = libc::AF_INET6 as libc::sa_family_t;
                s.sin6_port = a.port().to_be();
                s.sin6_addr.s6_addr = a.ip().octets();
                s.sin6_flowinfo = a.flowinfo();
                s.sin6_scope_id = a.scope_id();
                size_of::<libc::sockaddr_in6>()
            }
        };
        SockAddr { storage, len: len as libc::socklen_t }
    }
}

/// Where a socket is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Addr {
    /// A socket in the file system.
    Unix(PathBuf),
    /// TCP.
    Inet {
        /// A name or a number; empty means every interface when listening.
        host: String,
        /// The port; 0 lets the system choose when listening.
        port: u16,
    },
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Addr::Unix(path) => write!(f, "{}", path.display()),
            Addr::Inet { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Addr::Inet { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl CoreIo {
    /// Connects. A host name is resolved on the thread pool; each of its addresses is tried in turn.
    ///
    /// # Errors
    /// The system's, with the address as context. Dropping the future cancels the attempt.
    pub async fn connect(&self, addr: &Addr) -> Result<Stream> {
        let addrs = match addr {
            Addr::Unix(path) => {
                // The way there may not answer, and connecting would wait for it inside of the system call that submits.
                let name = path.clone();
                self.blocking_at(path, move || crate::sys::is_socket(&name)).await;
                vec![SockAddr::unix(path)?]
            }
            Addr::Inet { host, port } => self.resolve(host, *port).await?,
        };
        let mut last = None;
        for a in addrs {
            let socket = new_socket(a.family())?;
            match self.submit(Op::Connect { socket: socket.clone(), addr: Box::new(a) }).await {
                Ok(_) => {
                    no_delay(&socket, a.family());
                    return Ok(self.stream(socket));
                }
                Err(e) => last = Some(e),
            }
        }
        let e = last.unwrap_or_else(|| Error::new(ErrorKind::NotFound, "the name has no address"));
        Err(e.context(format!("Failed to connect to '{addr}'")))
    }

    /// Listens. A stale Unix socket (one that nobody listens on) is replaced; a live one is not. The listener removes
    /// its own Unix socket when it is dropped.
    ///
    /// # Errors
    /// `Busy` when somebody listens there already; else the system's, with the address as context.
    pub async fn listen(&self, addr: &Addr) -> Result<Listener> {
        match addr {
            Addr::Unix(path) => self.listen_unix(path).await,
            Addr::Inet { host, port } => {
                let host = if host.is_empty() { "::" } else { host };
                let mut last = Error::new(ErrorKind::NotFound, "the name has no address");
                for a in self.resolve(host, *port).await? {
                    match listen_at(&a) {
                        Ok(socket) => return Ok(Listener { io: self.clone(), socket, bound: None }),
                        Err(e) => last = e,
                    }
                }
                Err(last.context(format!("Failed to listen on '{addr}'")))
            }
        }
    }

    /// Finds out whether [`CoreIo::listen`] would succeed, and leaves no trace: a Unix socket is not made, a port is
    /// bound for an instant and nobody can connect to it.
    ///
    /// # Errors
    /// As [`CoreIo::listen`].
    pub async fn check_listen(&self, addr: &Addr) -> Result<()> {
        let context = || format!("Failed to listen on '{addr}'");
        match addr {
            Addr::Unix(path) => {
                let at = SockAddr::unix(path)?;
                let name = path.clone();
                let absent = self.blocking_at(path, move || {
                    if name.symlink_metadata().is_ok() {
                        return Ok(false);
                    }
                    let dir = name.parent().filter(|p| !p.as_os_str().is_empty());
                    crate::sys::check_writable_dir(dir.unwrap_or(Path::new("."))).map(|()| true)
                });
                match absent.await.context(context)? {
                    true => Ok(()),
                    false => self.check_left_over(path, at).await.context(context),
                }
            }
            Addr::Inet { host, port } => {
                let host = if host.is_empty() { "::" } else { host };
                let mut last = Error::new(ErrorKind::NotFound, "the name has no address");
                for a in self.resolve(host, *port).await? {
                    match bound(&a) {
                        Ok(_) => return Ok(()),
                        Err(e) => last = e,
                    }
                }
                Err(last.context(context()))
            }
        }
    }

    /// Fails unless what is at a path is the socket of a server that is dead.
    async fn check_left_over(&self, path: &Path, addr: SockAddr) -> Result<()> {
        let name = path.to_owned();
        let is_socket = self.blocking_at(path, move || crate::sys::is_socket(&name)).await;
        if !is_socket {
            return Err(Error::new(ErrorKind::AlreadyExists, "there is a file that is not a socket"));
        }
        if self.is_live(addr).await {
            return Err(Error::new(ErrorKind::Busy, "another process listens there already"));
        }
        Ok(())
    }

    async fn listen_unix(&self, path: &Path) -> Result<Listener> {
        let context = || format!("Failed to listen on '{}'", path.display());
        let addr = SockAddr::unix(path)?;
        let listen = || self.blocking_at(path, move || listen_at(&addr));
        let socket = match listen().await {
            Err(e) if e.errno() == libc::EADDRINUSE => {
                self.check_left_over(path, addr).await.context(context)?;
                let name = path.to_owned();
                self.blocking_at(path, move || std::fs::remove_file(name)).await.context(context)?;
                listen().await.context(context)?
            }
            other => other.context(context)?,
        };
        let name = path.to_owned();
        let bound = self.blocking_at(path, move || Bound::of(name)).await;
        Ok(Listener { io: self.clone(), socket, bound })
    }

    /// Whether somebody listens at a Unix address. The kernel ends the ring of a killed process a little after the
    /// process, and until then its sockets accept connections: where the process that began to listen is dead, we look
    /// again for a while. (It may be dead and the socket live, when a child has inherited it.)
    async fn is_live(&self, addr: SockAddr) -> bool {
        for _ in 0..LINGER_TRIES {
            let Ok(probe) = new_socket(libc::AF_UNIX) else { return true };
            match self.submit(Op::Connect { socket: probe.clone(), addr: Box::new(addr) }).await {
                Err(e) if e.errno() == libc::ECONNREFUSED => return false,
                Ok(_) if listener_is_dead(&probe) => {}
                _ => return true,
            }
            let deadline = self.core().now() + LINGER_PAUSE;
            crate::core::Sleep { core: self.core().clone(), deadline, key: None }.await;
        }
        true
    }

    async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SockAddr>> {
        use std::net::ToSocketAddrs;
        if let Ok(ip) = host.parse::<std::net::IpAddr>() {
            return Ok(vec![SockAddr::inet((ip, port).into())]);
        }
        let name = host.to_owned();
        let found = self
            .blocking(WaitsFor::Names, move || {
                (name.as_str(), port).to_socket_addrs().map(|a| a.collect::<Vec<_>>())
            })
            .await
            .context(|| format!("address resolution failed for '{host}'"))?;
        Ok(found.into_iter().map(SockAddr::inet).collect())
    }

    /// A stream of this core for a connected socket.
    pub fn stream(&self, socket: Socket) -> Stream {
        let end = End { fd: socket.0, is_socket: true };
        Stream { io: self.clone(), read: end.clone(), write: end }
    }

    /// A listener of this core for a socket that listens already (handed over by another program).
    pub fn listener(&self, socket: Socket) -> Listener {
        Listener { io: self.clone(), socket, bound: None }
    }

    /// Standard input and output as one stream. Neither is closed at the end.
    ///
    /// # Errors
    /// When one of them is not open.
    pub fn stdio(&self) -> Result<Stream> {
        let end = |fd: BorrowedFd<'_>| -> Result<End> {
            Ok(End { fd: Arc::new(fd.try_clone_to_owned()?), is_socket: false })
        };
        Ok(Stream {
            io: self.clone(),
            read: end(std::io::stdin().as_fd())?,
            write: end(std::io::stdout().as_fd())?,
        })
    }
}

/// A socket that accepts connections on this core.
pub struct Listener {
    io: CoreIo,
    socket: Socket,
    bound: Option<Bound>,
}

/// A Unix socket to remove.
struct Bound {
    path: PathBuf,
    /// Device and inode, in case somebody else has put another one there.
    id: (u64, u64),
    storage: Storage,
}

impl Bound {
    /// Asks the file system.
    fn of(path: PathBuf) -> Option<Bound> {
        let id = crate::sys::file_id(&path).ok()?;
        let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let storage = crate::sys::storage_of(std::fs::File::open(dir).ok()?);
        Some(Bound { path, id, storage })
    }

    fn remove(&self) {
        if crate::sys::file_id(&self.path).ok() == Some(self.id) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    /// The next connection. Dropping the future loses none.
    ///
    /// # Errors
    /// The system's; after a shortage of descriptors (`EMFILE`) trying again later makes sense.
    pub async fn accept(&self) -> Result<Stream> {
        Ok(self.io.stream(self.accept_socket().await?))
    }

    /// The next connection as a socket that another core can take ([`CoreIo::stream`]).
    ///
    /// # Errors
    /// As for [`Listener::accept`].
    pub async fn accept_socket(&self) -> Result<Socket> {
        let fd = self.io.submit(Op::Accept { socket: self.socket.clone() }).await?;
        // SAFETY: the kernel just made this descriptor for us.
        let socket = Socket::from_fd(unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
        if self.bound.is_none() {
            no_delay(&socket, libc::AF_INET);
        }
        Ok(socket)
    }

    /// The TCP port; `None` for Unix sockets.
    pub fn port(&self) -> Option<u16> {
        let mut a = SockAddr::inet(std::net::SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 0], 0)));
        let mut len = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        // SAFETY: the storage has `len` bytes.
        let r = unsafe { libc::getsockname(self.socket.raw(), (&raw mut a.storage).cast(), &mut len) };
        if r != 0 {
            return None;
        }
        match a.family() {
            libc::AF_INET | libc::AF_INET6 => {
                // SAFETY: the port is at the same place in both address types.
                Some(u16::from_be(unsafe { (*(&raw const a.storage).cast::<libc::sockaddr_in>()).sin_port }))
            }
            _ => None,
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(bound) = self.bound.take() else { return };
        bound.storage.soon(move || bound.remove());
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Listener({:?})", self.socket)
    }
}

#[derive(Clone)]
struct End {
    fd: Arc<OwnedFd>,
    is_socket: bool,
}

/// A byte stream of this core: a connected socket, or standard input and output. Cheap to clone; one task may
/// receive while another sends, but two tasks must not send at the same time.
#[derive(Clone)]
pub struct Stream {
    io: CoreIo,
    read: End,
    write: End,
}

impl Stream {
    /// Receives at least one byte into the buffers; 0 at the end of the stream. Dropping the future while it waits may
    /// lose bytes that came at that moment: do so only when the stream is given up.
    ///
    /// # Errors
    /// The system's; `Disconnected` when the peer vanished.
    pub async fn recv(&self, iov: &IoVec) -> Result<usize> {
        if iov.is_empty() {
            return Ok(0);
        }
        if self.read.is_socket {
            let op = Op::Recv { socket: Socket(self.read.fd.clone()), iov: iov.clone() };
            return Ok(self.io.submit(op).await? as usize);
        }
        self.io.submit(Op::Poll { fd: self.read.fd.clone(), events: libc::POLLIN }).await?;
        let first = &iov.segments()[0];
        crate::sys::read(self.read.fd.as_raw_fd(), first)
    }

    /// The same for one buffer.
    ///
    /// # Errors
    /// As for [`Stream::recv`].
    pub async fn recv_buf(&self, buf: &Buf) -> Result<usize> {
        self.recv(&IoVec::from(buf.clone())).await
    }

    /// Receives until the buffers are full.
    ///
    /// # Errors
    /// `Disconnected` when the stream ends before; else as for [`Stream::recv`].
    pub async fn recv_exact(&self, iov: &IoVec) -> Result<()> {
        let mut done = 0;
        while done < iov.len() {
            let n = if done == 0 {
                self.recv(iov).await?
            } else {
                self.recv(&iov.slice(done, iov.len() - done)).await?
            };
            if n == 0 {
                return Err(Error::new(ErrorKind::Disconnected, "unexpected end of the stream"));
            }
            done += n;
        }
        Ok(())
    }

    /// Sends all bytes. Dropping the future in between leaves an unknown part of them sent.
    ///
    /// # Errors
    /// `Disconnected` when the peer vanished.
    pub async fn send_all(&self, iov: &IoVec) -> Result<()> {
        let mut done = 0;
        while done < iov.len() {
            let rest = if done == 0 { iov.clone() } else { iov.slice(done, iov.len() - done) };
            if self.write.is_socket {
                let op = Op::Send { socket: Socket(self.write.fd.clone()), iov: rest };
                done += self.io.submit(op).await? as usize;
            } else {
                self.io.submit(Op::Poll { fd: self.write.fd.clone(), events: libc::POLLOUT }).await?;
                let first = &rest.segments()[0];
                done += crate::sys::write(
                    self.write.fd.as_raw_fd(),
                    &first.slice(0, first.len().min(PIPE_CHUNK)),
                )?;
            }
        }
        Ok(())
    }

    /// Copies bytes and sends them: for small messages.
    ///
    /// # Errors
    /// As for [`Stream::send_all`].
    pub async fn send_bytes(&self, bytes: &[u8]) -> Result<()> {
        self.send_all(&crate::Memory::from_slice(bytes).iovec()).await
    }

    /// Ends both directions: whoever waits in `recv` sees the end of the stream. Standard input and output are left alone.
    pub fn shutdown(&self) {
        self.shut(libc::SHUT_RDWR);
    }

    /// Ends the sending direction.
    pub fn shutdown_write(&self) {
        self.shut(libc::SHUT_WR);
    }

    fn shut(&self, how: i32) {
        if self.write.is_socket {
            // SAFETY: a plain call on an open descriptor. Errors mean that the peer is gone already.
            unsafe { libc::shutdown(self.write.fd.as_raw_fd(), how) };
        }
    }

    /// The core that this stream belongs to.
    pub fn io(&self) -> &CoreIo {
        &self.io
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream(fd {})", self.read.fd.as_raw_fd())
    }
}

fn new_socket(family: i32) -> Result<Socket> {
    // SAFETY: a plain call.
    let fd = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(Socket(Arc::new(unsafe { OwnedFd::from_raw_fd(fd) })))
}

/// A socket with an address, at which nobody listens yet.
fn bound(addr: &SockAddr) -> Result<Socket> {
    let socket = new_socket(addr.family())?;
    if addr.family() != libc::AF_UNIX {
        set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR);
    }
    let (ptr, len) = addr.as_raw();
    // SAFETY: a valid address of that length.
    if unsafe { libc::bind(socket.raw(), ptr, len) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(socket)
}

fn listen_at(addr: &SockAddr) -> Result<Socket> {
    let socket = bound(addr)?;
    // SAFETY: a plain call.
    if unsafe { libc::listen(socket.raw(), BACKLOG) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(socket)
}

/// Whether the process that began to listen at the other end of a connected Unix socket has ended. False when it is
/// not visible from here.
fn listener_is_dead(socket: &Socket) -> bool {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of_val(&peer) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into `peer`, which is as large.
    let r = unsafe {
        libc::getsockopt(
            socket.raw(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    if r != 0 || peer.pid <= 0 {
        return false;
    }
    // SAFETY: signal 0 only asks whether the process exists.
    let r = unsafe { libc::kill(peer.pid, 0) };
    r != 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH)
}

fn no_delay(socket: &Socket, family: i32) {
    if family != libc::AF_UNIX {
        set_option(socket, libc::IPPROTO_TCP, libc::TCP_NODELAY);
    }
}

/// Turns an option on. It is an optimisation or a convenience everywhere, so errors are ignored.
fn set_option(socket: &Socket, level: i32, option: i32) {
    let on: libc::c_int = 1;
    // SAFETY: the value is one int.
    unsafe {
        libc::setsockopt(
            socket.raw(),
            level,
            option,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
}
