//! Where io_uring is forbidden the thread engine takes over and says so.

use std::process::Command;

use dolmen_rt::{Config, EngineKind, Memory, block_on_with};

use crate::temp_file;

/// A process with a system call filter that refuses io_uring, as container runtimes install it.
#[test]
fn a_filter_forbids_io_uring() {
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "fallback::helper_without_io_uring", "--ignored", "--nocapture"])
        .env("DOLMEN_TEST_FILTER", "1")
        .env_remove("DOLMEN_IO")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
    assert!(text.contains("engine: threads (io_uring is not available: Operation not permitted"), "{text}");
}

/// Not a test of its own: the process of [`a_filter_forbids_io_uring`].
#[test]
#[ignore = "run by a_filter_forbids_io_uring"]
fn helper_without_io_uring() {
    if std::env::var_os("DOLMEN_TEST_FILTER").is_none() {
        return;
    }
    forbid(libc::SYS_io_uring_setup);
    block_on_with(&Config::from_env(), |rt| async move {
        let io = rt.io().unwrap();
        assert_eq!(io.engine(), EngineKind::Threads);
        println!("engine: {}", io.engine_note());
        let file = temp_file();
        io.write_all_at(&file, &Memory::from_slice(b"works").iovec(), 0, true).await.unwrap();
        let back = Memory::zeroed(5);
        io.read_exact_at(&file, &back.iovec(), 0).await.unwrap();
        assert_eq!(back.to_vec(), b"works");
    })
    .unwrap();
    let forced = Config::default().with_engine(EngineKind::IoUring);
    let e = block_on_with(&forced, |_| async {}).unwrap_err();
    assert!(e.to_string().contains("io_uring is not available"), "{e}");
    assert!(e.remedy_text().unwrap().contains("DOLMEN_IO"));
}

/// Makes one system call fail with EPERM in this thread and those it starts.
fn forbid(call: libc::c_long) {
    const LOAD_NUMBER: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP_IF: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let mut program = [
        libc::sock_filter { code: LOAD_NUMBER, jt: 0, jf: 0, k: 0 },
        libc::sock_filter { code: JUMP_IF, jt: 0, jf: 1, k: call as u32 },
        libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_ERRNO | libc::EPERM as u32 },
        libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW },
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: a valid program of the given length.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter), 0);
    }
}
