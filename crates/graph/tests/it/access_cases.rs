//! The cases of the access-control design, at the level of drafts, with stand-ins for the
//! jobs: what must be refused, and, as important, what must keep working.
//!
//! H1 to H5 are measured failures of QEMU: sequences that it
//! accepts and that lose data or give a silently wrong copy.

use std::sync::Arc;

use dolmen_graph::Draft;
use dolmen_sim::Sim;
use dolmen_sim::stand_in::{self as op, World, assert_refused};
use dolmen_types::{Actions, ChildRole, Error, NodeName, Result};

type Step = fn(&mut Draft) -> Result<()>;

/// Publishes the steps one after the other. All but the last must be granted.
fn try_steps(steps: &'static [Step]) -> Result<()> {
    Sim::run(1, move |rt| async move {
        let mut world = World::new(&rt).await.expect("the chain itself is granted");
        let (last, before) = steps.split_last().expect("a case has a step");
        for step in before {
            world.run(step).await.expect("the steps before the last are granted");
        }
        let graph = world.owner.graph().clone();
        let result = world.run(last).await;
        if result.is_err() {
            assert_eq!(world.owner.graph().generation, graph.generation, "a refusal leaves no trace");
            assert!(Arc::ptr_eq(&world.owner.graph(), &graph));
            assert_eq!(
                world.owner.graph().node("base").map(|n| n.size()),
                Some(1 << 20),
                "nothing has been done"
            );
        }
        world.owner.close().await.expect("ends cleanly");
        result
    })
}

#[track_caller]
fn granted(steps: &'static [Step]) {
    if let Err(e) = try_steps(steps) {
        panic!("refused: {e}");
    }
}

#[track_caller]
fn refused(steps: &'static [Step], node: &str, actions: Actions, asks: &str, denies: &str) -> Error {
    let error = try_steps(steps).expect_err("must be refused");
    assert_refused(&error, node, actions, asks, denies);
    error
}

const MIRROR: Step = |d| op::mirror(d, "j", "top", "t1");
const BACKUP: Step = |d| op::backup(d, "j", "top", "t1", None);
const STREAM: Step = |d| op::stream(d, "j", "top", None);
const COMMIT_ACTIVE_1: Step = |d| op::commit(d, "j", "top", "mid", true);
const COMMIT_ACTIVE_2: Step = |d| op::commit(d, "j", "top", "base", true);
const COMMIT_MID: Step = |d| op::commit(d, "j", "mid", "base", false);
const WRITE_TOP: Step = |d| op::export(d, "e", "top", true);
const READ_TOP: Step = |d| op::export(d, "e", "top", false);
const LATE_WRITE_TOP: Step = |d| op::export(d, "k", "top", true);
const WRITE_MID: Step = |d| op::export(d, "k", "mid", true);
const READ_MID: Step = |d| op::export(d, "k", "mid", false);
const WRITE_BASE: Step = |d| op::export(d, "k", "base", true);
const RELINK_TOP: Step = |d| op::relink_backing(d, "k", "top", "base");

#[test]
fn h1_a_writer_below_a_mirrored_node() {
    let e = refused(&[MIRROR, WRITE_BASE], "base", Actions::V, "k", "j");
    assert_eq!(
        e.to_string(),
        "node 'base': export 'k' (nbd, writable) needs to write data, but job 'j' (mirror of 'top', since 0 s) \
         reads it as part of its source. Finish the job first (job-complete or job-cancel 'j'), or export it \
         read-only."
    );
}

#[test]
fn h2_a_relink_below_a_mirrored_node() {
    refused(&[MIRROR, RELINK_TOP], "top", Actions::V, "k", "j");
}

/// The late export attaches to the outermost filter, so the mirror sees its writes.
#[test]
fn h3_an_export_by_name_during_a_mirror() {
    granted(&[MIRROR, LATE_WRITE_TOP]);
    granted(&[WRITE_TOP, MIRROR]);
    lands_on("top", "j-filter", &[MIRROR, LATE_WRITE_TOP]);
}

#[test]
fn h4_an_export_by_name_during_an_active_commit() {
    granted(&[COMMIT_ACTIVE_1, LATE_WRITE_TOP]);
    lands_on("top", "j-filter", &[COMMIT_ACTIVE_1, LATE_WRITE_TOP]);
}

#[test]
fn h5_a_relink_below_a_node_that_is_backed_up() {
    refused(&[BACKUP, RELINK_TOP], "top", Actions::V, "k", "j");
}

/// Asserts where the last step's export 'k' is attached.
#[track_caller]
fn lands_on(named: &str, filter: &'static str, steps: &'static [Step]) {
    let named = named.to_owned();
    Sim::run(1, move |rt| async move {
        let mut world = World::new(&rt).await.unwrap();
        for step in steps {
            world.run(step).await.unwrap();
        }
        let id = dolmen_types::OpId::internal("k");
        let edge = world.owner.edges(&id).next().expect("attached").clone();
        assert_eq!(edge.node().name.as_str(), filter);
        // When the job ends, the export stays, on the node that it named.
        let mut d = world.owner.draft();
        d.remove_op(&dolmen_types::OpId::internal("j"));
        world.owner.commit(d).await.unwrap();
        assert_eq!(edge.node().name.as_str(), named);
        assert!(world.owner.graph().node(filter).is_none());
    });
}

#[test]
fn active_commits_under_a_writable_export() {
    granted(&[WRITE_TOP, COMMIT_ACTIVE_1]);
    granted(&[WRITE_TOP, COMMIT_ACTIVE_2]);
    refused(&[COMMIT_ACTIVE_2, READ_MID], "mid", Actions::D, "k", "j");
    // Below the target nothing is stale, but the guest reads it.
    refused(&[WRITE_TOP, COMMIT_ACTIVE_1, WRITE_BASE], "base", Actions::V, "k", "mid");
    refused(&[COMMIT_ACTIVE_2, WRITE_BASE], "base", Actions::V, "k", "j");
}

#[test]
fn intermediate_commits() {
    granted(&[COMMIT_MID, READ_MID]);
    granted(&[WRITE_TOP, COMMIT_MID]);
    refused(&[COMMIT_MID, WRITE_MID], "j-filter", Actions::V, "k", "j");
    // With a writer on its top node it runs as an active commit.
    granted(&[WRITE_MID, COMMIT_MID]);
}

#[test]
fn copy_before_write() {
    granted(&[WRITE_TOP, |d| op::copy_before_write(d, "c", "top", "t1")]);
    let e = refused(
        &[|d| op::copy_before_write(d, "c", "top", "t1"), |d| op::export(d, "s", "c", false), LATE_WRITE_TOP],
        "top",
        Actions::V,
        "k",
        "c",
    );
    assert!(e.to_string().contains("use node 'c' instead"), "the filter is named as the way: {e}");
}

#[test]
fn copy_on_read_beside_a_mirror() {
    granted(&[MIRROR, |d| op::copy_on_read(d, "c", "top", None)]);
    granted(&[|d| op::copy_on_read(d, "c", "top", None), |d| op::export(d, "e", "c", true), MIRROR]);
    // A chain that a filter relies on is not pivoted.
    let e = refused(&[|d| op::copy_on_read(d, "c", "top", Some("mid")), MIRROR], "top", Actions::P, "j", "c");
    assert!(e.to_string().contains("blockdev-del 'c'"), "{e}");
}

#[test]
fn streams() {
    granted(&[STREAM, WRITE_TOP]);
    granted(&[WRITE_TOP, STREAM]);
    refused(&[STREAM, WRITE_MID], "mid", Actions::V, "k", "j");
    refused(&[STREAM, |d| op::resize(d, "k", "top")], "top", Actions::S, "k", "j");
    // What lies below the bottom is not copied, but read.
    refused(&[|d| op::stream(d, "j", "top", Some("mid")), WRITE_BASE], "base", Actions::V, "k", "mid");
    refused(&[|d| op::stream(d, "j", "top", Some("mid")), WRITE_MID], "mid", Actions::V, "k", "j");
}

/// The fleecing target keeps its backing link below the backup's filter.
#[test]
fn fleecing() {
    const BACK_T1: Step = |d| d.link(&NodeName::internal("t1"), "backing", ChildRole::Backing, "top");
    granted(&[BACK_T1, WRITE_TOP, BACKUP, |d| op::export(d, "k", "t1", false)]);
    Sim::run(1, |rt| async move {
        let mut world = World::new(&rt).await.unwrap();
        for step in [BACK_T1, WRITE_TOP, BACKUP] {
            world.run(step).await.unwrap();
        }
        let graph = world.owner.graph();
        let backing = graph.node("t1").unwrap().backing().unwrap();
        assert_eq!(backing.name.as_str(), "top");
        assert_eq!(graph.users().next().unwrap().node().name.as_str(), "j-filter");
    });
    refused(&[BACKUP, |d| op::export(d, "k", "t1", true)], "t1", Actions::V, "k", "j");
}

#[test]
fn several_writers_and_readers() {
    granted(&[WRITE_TOP, LATE_WRITE_TOP]);
    granted(&[
        |d| d.link(&NodeName::internal("ov"), "backing", ChildRole::Backing, "mid"),
        WRITE_TOP,
        |d| op::export(d, "x", "ov", true),
    ]);
}

#[test]
fn below_a_format_only_the_format_writes() {
    let e = refused(&[|d| op::export(d, "k", "top-f", true)], "top-f", Actions::V, "k", "top");
    assert!(e.to_string().contains("use node 'top' instead"), "{e}");
}

#[test]
fn resize_under_an_export() {
    refused(&[READ_TOP, |d| op::resize(d, "k", "top")], "top", Actions::S, "k", "e");
    granted(&[|d| op::resize(d, "k", "top")]);
}

#[test]
fn snapshots_and_pivots() {
    refused(&[MIRROR, |d| op::external_snapshot(d, "k", "top")], "top", Actions::P, "k", "j");
    granted(&[MIRROR, |d| op::external_snapshot(d, "k", "t2")]);
}

#[test]
fn bitmaps_are_objects_of_their_own() {
    const WITH_BITMAP: Step = |d| op::backup(d, "j", "top", "t1", Some("bm0"));
    refused(&[WITH_BITMAP, |d| op::change_bitmap(d, "k", "top", "bm0")], "top", Actions::M, "k", "j");
    granted(&[WITH_BITMAP, |d| op::change_bitmap(d, "k", "top", "bm1")]);
    granted(&[WITH_BITMAP, |d| op::change_bitmap(d, "k", "mid", "bm0")]);
}

#[test]
fn a_job_on_the_same_node_or_target() {
    refused(&[MIRROR, |d| op::mirror(d, "k", "top", "t2")], "top", Actions::P, "k", "j");
    refused(&[MIRROR, |d| op::mirror(d, "k", "mid", "t1")], "t1", Actions::V, "k", "j");
    granted(&[MIRROR, |d| op::backup(d, "k", "top", "t2", None)]);
    granted(&[WRITE_TOP, BACKUP, |d| op::backup(d, "k", "top", "t2", None)]);
    granted(&[WRITE_TOP, BACKUP, |d| op::mirror(d, "k", "top", "t2")]);
}

/// What one job claims on another one's filter goes on when that job is over.
#[test]
fn the_second_of_two_jobs_stays_guarded_when_the_first_ends() {
    granted(&[
        BACKUP,
        |d| op::backup(d, "k", "top", "t2", None),
        |d| {
            d.remove_op(&dolmen_types::OpId::internal("j"));
            assert_eq!(d.readers(&NodeName::internal("top")).len(), 2, "top and the filter that is left");
            Ok(())
        },
    ]);
    refused(
        &[
            BACKUP,
            |d| op::backup(d, "k", "top", "t2", None),
            |d| {
                d.remove_op(&dolmen_types::OpId::internal("j"));
                Ok(())
            },
            |d| op::relink_backing(d, "r", "top", "base"),
        ],
        "top",
        Actions::V,
        "r",
        "k",
    );
}

const OV_ON_MID: Step = |d| d.link(&NodeName::internal("ov"), "backing", ChildRole::Backing, "mid");
const OV_ON_BASE: Step = |d| d.link(&NodeName::internal("ov"), "backing", ChildRole::Backing, "base");
const OV_ON_TOP: Step = |d| d.link(&NodeName::internal("ov"), "backing", ChildRole::Backing, "top");
const READ_OV: Step = |d| op::export(d, "x", "ov", false);
/// A filter of a user over `base`.
const RAW_OVER_BASE: Step = |d| {
    let raw = op::StandIn::new(&op::RAW, dolmen_graph::AccessRule::FILTER);
    op::add(d, "r", raw, None, &[("file", ChildRole::Filtered, "base")]).map(drop)
};

/// A sibling that ran over the same base saw its disk change: a backup into the base, a commit into
/// it and a writable export of it were all accepted as long as they were in its own process.
#[test]
fn a_backing_node_is_written_by_nobody_while_its_overlay_is_read() {
    let base = |steps: &'static [Step], asks: &str| {
        let e = refused(steps, "base", Actions::V, asks, "x");
        let text = e.to_string();
        assert!(text.contains("with x-backing-may-change=on"), "the option is named: {text}");
    };
    base(&[OV_ON_BASE, READ_OV, WRITE_BASE], "k");
    base(&[OV_ON_BASE, READ_OV, |d| op::backup(d, "j", "t1", "base", None)], "j");
    base(&[OV_ON_BASE, READ_OV, |d| op::mirror(d, "j", "t1", "base")], "j");
    base(&[OV_ON_BASE, READ_OV, WRITE_TOP, COMMIT_MID], "j");
    base(&[OV_ON_BASE, READ_OV, WRITE_TOP, COMMIT_ACTIVE_2], "j");
    refused(&[OV_ON_MID, READ_OV, WRITE_TOP, COMMIT_ACTIVE_1], "mid", Actions::V, "j", "x");
    // Whoever comes second is refused.
    refused(&[OV_ON_BASE, WRITE_BASE, READ_OV], "base", Actions::V, "k", "x");
    refused(&[OV_ON_BASE, WRITE_TOP, COMMIT_MID, READ_OV], "base", Actions::V, "j", "x");
    // At any level, and through a filter.
    refused(&[WRITE_TOP, WRITE_BASE], "base", Actions::V, "k", "e");
    refused(&[RAW_OVER_BASE, WRITE_TOP, |d| op::export(d, "k", "r", true)], "base", Actions::V, "k", "e");
    refused(
        &[READ_OV, |d| op::resize(d, "k", "base"), OV_ON_BASE, |d| op::resize(d, "k", "base")],
        "base",
        Actions::S,
        "k",
        "x",
    );
    // The image between the top node of a commit and its base shows what is written.
    refused(
        &[OV_ON_TOP, READ_OV, READ_MID, |d| op::commit(d, "j", "top", "base", false)],
        "base",
        Actions::V,
        "j",
        "k",
    );
}

#[test]
fn an_overlay_that_nobody_reads_forbids_nothing() {
    granted(&[OV_ON_BASE, WRITE_BASE]);
    granted(&[OV_ON_BASE, |d| op::backup(d, "j", "t1", "base", None)]);
    granted(&[OV_ON_BASE, WRITE_TOP, COMMIT_MID]);
    granted(&[OV_ON_BASE, |d| op::resize(d, "k", "base")]);
    // A copy is being made in it: it is written, not read.
    granted(&[OV_ON_BASE, |d| op::mirror(d, "j", "t2", "ov"), WRITE_BASE]);
}

/// Who said that the backing file may change is asked no more.
#[test]
fn an_overlay_whose_user_said_that_it_may_change() {
    const LOOSE: Step = |d| {
        let driver = op::StandIn::new(&op::FORMAT, dolmen_graph::AccessRule::FORMAT_OVER_CHANGING);
        let children = [("file", ChildRole::Metadata, "ov-f"), ("backing", ChildRole::Backing, "base")];
        d.remove_node("ov")?;
        op::add(d, "ov", driver, None, &children).map(drop)
    };
    granted(&[LOOSE, READ_OV, WRITE_BASE]);
    granted(&[LOOSE, READ_OV, |d| op::backup(d, "j", "t1", "base", None)]);
    granted(&[|d| d.remove_node("top"), |d| d.remove_node("mid"), LOOSE, |d| op::shrink(d, "k", "base")]);
}

/// An operation that keeps the overlay right writes below it, by whatever filters.
#[test]
fn keepers_write_below_what_they_keep_right() {
    // The commit of this very chain, also over two levels and beside a reader of its top node.
    granted(&[WRITE_TOP, READ_MID, COMMIT_MID]);
    granted(&[OV_ON_TOP, READ_OV, |d| op::commit(d, "j", "top", "base", false)]);
    granted(&[
        RAW_OVER_BASE,
        |d| d.link(&NodeName::internal("mid"), "backing", ChildRole::Backing, "r"),
        WRITE_TOP,
        COMMIT_MID,
    ]);
    // Fleecing, by a job and by a user's own node.
    granted(&[OV_ON_TOP, READ_OV, |d| op::backup(d, "j", "top", "ov", None), WRITE_TOP]);
    granted(&[
        OV_ON_TOP,
        |d| op::copy_before_write(d, "c", "top", "ov"),
        |d| op::export(d, "e", "c", true),
        READ_OV,
    ]);
    // The source is a filter over the image that the fleecing target lies over.
    granted(&[
        OV_ON_BASE,
        |d| d.remove_node("top"),
        |d| d.remove_node("mid"),
        RAW_OVER_BASE,
        |d| op::backup(d, "j", "r", "ov", None),
        READ_OV,
        |d| op::export(d, "e", "r", true),
    ]);
    // A writer past the filter is seen by nobody.
    refused(
        &[
            OV_ON_BASE,
            |d| d.remove_node("top"),
            |d| d.remove_node("mid"),
            RAW_OVER_BASE,
            |d| op::backup(d, "j", "r", "ov", None),
            READ_OV,
            WRITE_BASE,
        ],
        "base",
        Actions::V,
        "k",
        "x",
    );
}

/// A node was shrunk under its overlays, which read zeroes from then on, and for good.
#[test]
fn shrinking_takes_data_away_from_every_image_above() {
    const SHRINK_BASE: Step = |d| op::shrink(d, "k", "base");
    let e = refused(&[SHRINK_BASE], "mid", Actions::V, "k", "top");
    assert!(e.to_string().contains("Remove node 'top' first (blockdev-del)"), "{e}");
    refused(&[|d| d.remove_node("top"), SHRINK_BASE], "base", Actions::V, "k", "mid");
    // Also through filters, and of what lies below them.
    let through = |steps| refused(steps, "base", Actions::V, "k", "mid");
    through(&[|d| d.remove_node("top"), RAW_OVER_BASE, |d| op::shrink(d, "k", "r")]);
    refused(
        &[
            |d| d.remove_node("top"),
            RAW_OVER_BASE,
            |d| d.link(&NodeName::internal("mid"), "backing", ChildRole::Backing, "r"),
            SHRINK_BASE,
        ],
        "r",
        Actions::V,
        "k",
        "mid",
    );
    // What nothing lies over may be shrunk, and anything may grow that nobody reads.
    granted(&[|d| op::shrink(d, "k", "top"), |d| op::resize(d, "k", "base")]);
    granted(&[|d| op::shrink(d, "k", "ov")]);
}

/// An edge that belongs to nobody is there because of somebody: the refusal says who.
#[test]
fn a_refusal_through_a_filter_names_the_operation_above_it() {
    let e = refused(
        &[
            |d| {
                let raw = op::StandIn::new(&op::RAW, dolmen_graph::AccessRule::FILTER);
                op::add(d, "r", raw, None, &[("file", ChildRole::Filtered, "base")]).map(drop)
            },
            MIRROR,
            |d| op::export(d, "k", "r", true),
        ],
        "base",
        Actions::V,
        "k",
        "j",
    );
    let text = e.to_string();
    assert!(text.contains("node 'r' (raw, filtered child 'file', for export 'k' (nbd, writable)"), "{text}");
    assert!(text.contains("export it read-only"), "{text}");
}

#[test]
fn deleting() {
    let in_use = |steps| try_steps(steps).unwrap_err().to_string();
    let e = in_use(&[|d| d.remove_node("mid")]);
    assert_eq!(e, "Node mid is in use: it is the 'backing' child of node 'top'");
    let e = in_use(&[READ_TOP, |d| d.remove_node("top")]);
    assert_eq!(e, "Node top is in use: export 'e' (nbd, read-only)");
    let e = in_use(&[MIRROR, |d| d.remove_node("t1")]);
    assert_eq!(e, "Node t1 is in use: job 'j' (mirror of 'top')");
    let e = in_use(&[MIRROR, |d| d.remove_node("j-filter")]);
    assert_eq!(e, "Node j-filter belongs to operation 'j'");
    granted(&[|d| d.remove_node("top"), |d| d.remove_node("mid")]);
}
