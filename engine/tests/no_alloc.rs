//! A step that was run once allocates nothing.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use engine::backends::cpu::{Cpu, Isa};
use engine::executor::Serial;
use engine::{Batch, Context, ContextParams, Executor};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// Counts the allocations of the calling thread.
struct Counting;

// SAFETY: every call is the system allocator's own; counting touches no memory of the allocation.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Tokens generated one by one, across a page of the cache and with more than one kind of layer.
#[test]
fn a_token_allocates_nothing() {
    let Some(dir) = common::goldens() else { return };
    for name in ["llama-b", "gemma3-b", "qwen3moe-b", "gpt-oss-b", "phi3-a", "quantmix-a"] {
        let path = dir.join(format!("tiny/{name}.gguf"));
        if !path.exists() {
            continue;
        }
        let model = common::model(&path);
        for executor in [Arc::new(Serial) as Arc<dyn Executor>, Arc::new(engine::pool::Pool::new(2).unwrap())]
        {
            let cpu = Cpu::new(model.weights().clone(), executor, Isa::detect());
            let params = ContextParams { n_ctx: 256, ..ContextParams::default() };
            let mut context = Context::new(model.clone(), Box::new(cpu), params).unwrap();
            context.decode(&Batch::prompt(0, &[1, 2, 3, 4])).unwrap();
            let mut batch = Batch::prompt(0, &[5]);
            context.decode(&batch).unwrap();
            let before = ALLOCATIONS.with(Cell::get);
            for token in 0..100 {
                batch.tokens[0].token = token;
                context.decode(&batch).unwrap();
            }
            let n = ALLOCATIONS.with(Cell::get) - before;
            assert_eq!(n, 0, "{name}: {n} allocations in 100 tokens");
        }
    }
}
