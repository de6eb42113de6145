//! The life of jobs: what happens in which order, alone and in groups.

use std::time::Duration;

use dolmen_types::ErrorKind;

use super::rig::{Fault, Rig, SIZE};
use crate::{Ending, IoStatus, OnError, Progress, Status};

fn statuses(id: &str, words: &str) -> String {
    let word = |w: &str| format!("{id}:{}", w.replace('_', " "));
    words.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_job_that_succeeds() {
    Rig::run(1, |mut rig| async move {
        let job = rig.job("j", rig.work(Fault::None), |_| {});
        rig.start_one(&job).await.expect("starts");
        assert_eq!(job.status(), Status::Running);
        assert_eq!(job.detail(), "reading of 'disk', running");
        assert_eq!(rig.owner.ops().len(), 1);
        rig.until(|| job.status() == Status::Null).await;
        assert_eq!(rig.events(), statuses("j", "created running waiting pending COMPLETED concluded null"));
        assert_eq!(job.progress(), Progress { current: SIZE, total: SIZE });
        assert_eq!(*rig.ends.borrow(), [("j".to_owned(), Ending::Success)]);
        assert!(rig.owner.ops().is_empty() && rig.owner.claims().is_empty());
    });
}

#[test]
fn finalized_and_dismissed_by_hand() {
    Rig::run(2, |mut rig| async move {
        let job = rig.job("j", rig.work(Fault::None), |o| {
            o.auto_finalize = false;
            o.auto_dismiss = false;
        });
        let group = rig.start_one(&job).await.expect("starts");
        rig.until(|| job.status() == Status::Pending).await;
        assert_eq!(rig.events(), statuses("j", "created running waiting pending PENDING"));
        assert_eq!(rig.owner.ops().len(), 1);
        job.check(&crate::Demand::Finalize).expect("may be finalized");
        group.finalize(&mut rig.owner).await.expect("publishes");
        assert_eq!(rig.events(), statuses("j", "COMPLETED concluded"));
        assert!(rig.owner.ops().is_empty());
        job.dismiss().expect("may be dismissed");
        assert_eq!(rig.events(), "j:null");
        assert!(job.dismiss().is_err());
    });
}

#[test]
fn cancelled_in_every_state() {
    for (state, sequence) in [
        (Status::Running, "aborting CANCELLED concluded null"),
        (Status::Paused, "running aborting CANCELLED concluded null"),
        (Status::Ready, "aborting CANCELLED concluded null"),
        (Status::Standby, "ready aborting CANCELLED concluded null"),
        (Status::Pending, "aborting CANCELLED concluded null"),
    ] {
        Rig::run(3, move |mut rig| async move {
            let mut work = rig.work(Fault::None);
            work.ready = matches!(state, Status::Ready | Status::Standby);
            let job = rig.job("j", work, |o| {
                o.auto_finalize = state != Status::Pending;
                o.speed = if matches!(state, Status::Running | Status::Paused) { 1 } else { 0 };
            });
            rig.start_one(&job).await.expect("starts");
            match state {
                Status::Paused => job.pause().expect("may pause"),
                Status::Standby => {
                    rig.until(|| job.status() == Status::Ready).await;
                    job.pause().expect("may pause");
                }
                _ => {}
            }
            rig.until(|| job.status() == state).await;
            rig.events();
            let before = rig.rt.now();
            job.cancel(true).expect("may be cancelled");
            rig.until(|| job.status() == Status::Null).await;
            assert!(rig.rt.now().since(before) < Duration::from_millis(100), "at once");
            assert_eq!(rig.events(), statuses("j", sequence), "{state:?}");
            assert_eq!(job.error().as_deref(), Some("Operation canceled"));
            assert_eq!(*rig.ends.borrow(), [("j".to_owned(), Ending::Abort)]);
            assert!(rig.owner.ops().is_empty());
        });
    }
}

#[test]
fn a_ready_job_is_completed_or_kept() {
    for complete in [true, false] {
        Rig::run(4, move |mut rig| async move {
            let mut work = rig.work(Fault::None);
            work.ready = true;
            let job = rig.job("j", work, |_| {});
            rig.start_one(&job).await.expect("starts");
            assert!(job.complete().is_err(), "not ready");
            rig.until(|| job.status() == Status::Ready).await;
            assert_eq!(rig.events(), statuses("j", "created running ready READY"));
            job.pause().expect("may pause");
            rig.until(|| job.status() == Status::Standby).await;
            let e = job.cancel(false).expect_err("paused");
            assert_eq!(e.to_string(), "The block job for device 'j' is currently paused");
            if complete {
                // Takes effect when it goes on.
                job.complete().expect("possible");
                rig.rt.sleep(Duration::from_secs(1)).await;
                assert_eq!(job.status(), Status::Standby);
            }
            job.resume().expect("may be resumed");
            rig.until(|| job.status() != Status::Standby).await;
            if !complete {
                job.cancel(false).expect("possible");
                let e = job.complete().expect_err("ends already");
                assert_eq!(e.to_string(), "The active block job 'j' cannot be completed");
            }
            rig.until(|| job.status() == Status::Null).await;
            assert_eq!(rig.events(), statuses("j", "standby ready waiting pending COMPLETED concluded null"));
        });
    }
}

#[test]
fn pausing_twice_and_resuming_what_runs() {
    Rig::run(5, |mut rig| async move {
        let job = rig.job("j", rig.work(Fault::None), |o| o.speed = SIZE);
        rig.start_one(&job).await.expect("starts");
        assert_eq!(job.resume().expect_err("runs").to_string(), "Can't resume a job that was not paused");
        job.pause().expect("may pause");
        assert_eq!(job.pause().expect_err("twice").to_string(), "Job is already paused");
        rig.until(|| job.status() == Status::Paused).await;
        let done = job.progress().current;
        rig.rt.sleep(Duration::from_secs(60)).await;
        assert_eq!(job.progress().current, done, "nothing moves");
        assert_eq!(job.estimated_remaining(), None);
        job.resume().expect("paused");
        rig.until(|| job.status() == Status::Null).await;
        assert_eq!(
            rig.events(),
            statuses("j", "created running paused running waiting pending COMPLETED concluded null")
        );
    });
}

#[test]
fn errors_by_policy() {
    let table: &[(OnError, ErrorKind, &str, IoStatus)] = &[
        (
            OnError::Report,
            ErrorKind::Io,
            "ERROR(read,report) aborting FAILED(Input/output_error:_injected) concluded null",
            IoStatus::Ok,
        ),
        (
            OnError::Enospc,
            ErrorKind::Io,
            "ERROR(read,report) aborting FAILED(Input/output_error:_injected) concluded null",
            IoStatus::Ok,
        ),
        (
            OnError::Ignore,
            ErrorKind::Io,
            "ERROR(read,ignore) waiting pending COMPLETED concluded null",
            IoStatus::Ok,
        ),
        (OnError::Stop, ErrorKind::Io, "ERROR(read,stop) paused", IoStatus::Failed),
        (OnError::Enospc, ErrorKind::NoSpace, "ERROR(read,stop) paused", IoStatus::NoSpace),
    ];
    for (policy, kind, sequence, io) in table {
        Rig::run(6, move |mut rig| async move {
            let job = rig.job("j", rig.work(Fault::Once(5, *policy, *kind)), |_| {});
            rig.start_one(&job).await.expect("starts");
            let done = job.clone();
            rig.until(move || matches!(done.status(), Status::Null | Status::Paused)).await;
            assert_eq!(rig.events(), statuses("j", &format!("created running {sequence}")));
            assert_eq!(job.io_status(), *io);
            if job.status() == Status::Paused {
                rig.rt.sleep(Duration::from_secs(5)).await;
                job.resume().expect("stopped");
                rig.until(|| job.status() == Status::Null).await;
                assert_eq!(job.io_status(), IoStatus::Ok);
                assert_eq!(rig.events(), statuses("j", "running waiting pending COMPLETED concluded null"));
                assert_eq!(job.progress().current, SIZE, "the piece was read after all");
            }
        });
    }
}

#[test]
fn a_header_that_cannot_be_written_aborts() {
    Rig::run(7, |mut rig| async move {
        let job = rig.job("j", rig.work(Fault::Settle), |_| {});
        rig.start_one(&job).await.expect("starts");
        rig.until(|| job.status() == Status::Null).await;
        assert_eq!(
            rig.events(),
            statuses(
                "j",
                "created running waiting pending aborting \
                 FAILED(No_space_left_on_device:_injected) concluded null"
            )
        );
        assert_eq!(*rig.ends.borrow(), [("j".to_owned(), Ending::Abort)]);
        assert!(rig.owner.ops().is_empty());
    });
}

#[test]
fn a_group_waits_for_its_last_member() {
    Rig::run(8, |mut rig| async move {
        let a = rig.job("a", rig.work(Fault::None), |_| {});
        let b = rig.job("b", rig.work(Fault::None), |o| o.speed = SIZE);
        rig.start(&[a.clone(), b.clone()]).await.expect("starts");
        rig.until(|| a.status() == Status::Waiting).await;
        assert_eq!(b.status(), Status::Running);
        rig.until(|| b.status() == Status::Null).await;
        assert_eq!(
            rig.events(),
            "a:created b:created a:running b:running a:waiting b:waiting b:pending a:pending \
             b:COMPLETED b:concluded b:null a:COMPLETED a:concluded a:null"
        );
    });
}

#[test]
fn one_that_fails_takes_the_group_along() {
    Rig::run(9, |mut rig| async move {
        let a = rig.job("a", rig.work(Fault::None), |_| {});
        let b = rig.job("b", rig.work(Fault::Once(9, OnError::Report, ErrorKind::Io)), |o| o.speed = SIZE);
        let c = rig.job("c", rig.work(Fault::None), |o| o.speed = 1);
        rig.start(&[a.clone(), b.clone(), c.clone()]).await.expect("starts");
        rig.until(|| a.status() == Status::Null && b.status() == Status::Null && c.status() == Status::Null)
            .await;
        let events = rig.events();
        assert!(events.contains("a:waiting"), "{events}");
        for expected in ["a:CANCELLED", "b:FAILED(Input/output error: injected)", "c:CANCELLED"] {
            assert!(events.contains(expected), "{events}");
        }
        assert!(rig.ends.borrow().iter().all(|(_, e)| *e == Ending::Abort));
        assert_eq!(rig.ends.borrow().len(), 3);
        assert!(rig.owner.ops().is_empty());
    });
}

#[test]
fn settling_fails_for_one_of_a_group() {
    Rig::run(10, |mut rig| async move {
        let a = rig.job("a", rig.work(Fault::None), |_| {});
        let b = rig.job("b", rig.work(Fault::Settle), |_| {});
        rig.start(&[a.clone(), b.clone()]).await.expect("starts");
        rig.until(|| a.status() == Status::Null && b.status() == Status::Null).await;
        assert_eq!(a.error().as_deref(), Some("Operation canceled"));
        assert_eq!(b.error().as_deref(), Some("No space left on device: injected"));
        assert!(rig.ends.borrow().iter().all(|(_, e)| *e == Ending::Abort));
    });
}

#[test]
fn a_refused_job_leaves_no_trace() {
    Rig::run(11, |mut rig| async move {
        let a = rig.job("a", rig.work(Fault::None), |o| o.speed = 1);
        rig.start_one(&a).await.expect("starts");
        let twice = rig.job("a", rig.work(Fault::None), |_| {});
        let before = rig.owner.graph().generation;
        rig.start_one(&twice).await.expect_err("the id is taken");
        assert_eq!(twice.status(), Status::Undefined);
        assert_eq!(rig.owner.graph().generation, before);
        assert_eq!(rig.owner.ops().len(), 1);
    });
}

/// The limit holds in virtual time, and another one takes effect at once.
#[test]
fn the_speed_limit_holds() {
    Rig::run(12, |mut rig| async move {
        let mut work = rig.work(Fault::None);
        work.pieces = 64;
        work.piece = SIZE / 64;
        let job = rig.job("j", work, |o| o.speed = SIZE / 16);
        let start = rig.rt.now();
        rig.start_one(&job).await.expect("starts");
        let half = job.clone();
        rig.until(move || half.progress().current >= SIZE / 2).await;
        let took = rig.rt.now().since(start);
        assert!(took >= Duration::from_millis(7_500) && took <= Duration::from_millis(8_500), "{took:?}");
        let left = job.estimated_remaining().expect("measured");
        assert!(left >= Duration::from_secs(7) && left <= Duration::from_secs(9), "{left:?}");
        // So slow that it would take for ever, then without a limit.
        job.set_speed(1).expect("possible");
        rig.rt.sleep(Duration::from_secs(100)).await;
        assert!(job.progress().current <= SIZE / 2 + 2 * SIZE / 64);
        let start = rig.rt.now();
        job.set_speed(0).expect("possible");
        rig.until(|| job.status() == Status::Null).await;
        assert!(rig.rt.now().since(start) < Duration::from_secs(1));
    });
}
